"""A Dask cluster on loopback for tests: a real scheduler and real `shoal worker` processes that can be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests.fleet import BIN, free_port, wait_until


class Cluster:
    """Processes, each with a log below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"tcp://127.0.0.1:{self.port}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start_scheduler(self, *options: str) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1"]
        self._spawn("scheduler", [*command, "--port", str(self.port), "--no-dashboard", "--no-show", *options])

    def start_plain_worker(self, name: str, resources: str) -> None:
        """What somebody starts who knows Dask and has read the docs."""
        command = [sys.executable, "-W", "ignore", "-m", "distributed.cli.dask_worker", self.url, "--nthreads", "1"]
        options = ["--host", "127.0.0.1", "--no-dashboard", "--local-directory", str(self.folder / name)]
        self._spawn(name, [*command, *options, "--resources", resources])

    def use_tls(self) -> dict[str, Path]:
        """Make a CA and one certificate for everybody; returns the settings of the server."""
        folder = self.folder / "tls"
        folder.mkdir()
        self.url = f"tls://127.0.0.1:{self.port}"
        for command in (
            "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=test-ca",
            "req -newkey rsa:2048 -nodes -keyout one.key -out one.csr -subj /CN=127.0.0.1",
            "x509 -req -in one.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out one.pem -days 2",
        ):
            subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
        return {
            f"dask_tls_{name}": folder / f for name, f in (("ca", "ca.pem"), ("cert", "one.pem"), ("key", "one.key"))
        }

    def start_worker(self, name: str, *options: str, **variables: str) -> None:
        self._spawn(name, [str(BIN / "shoal"), "worker", "--scheduler", self.url, "--name", name, *options], variables)

    def kill(self, name: str) -> None:
        """SIGKILL, as a power cut would."""
        process = self.processes.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def builds(self, name: str) -> list[psutil.Process]:
        """The conversion processes of a worker."""
        return conversions_of(self.processes[name].pid)

    def building(self, *names: str) -> str:
        """Wait until one of some workers builds; its name."""

        def found() -> str | None:
            return next((name for name in names if self.builds(name)), None)

        return wait_until("a build on a worker", found, 60)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def stop(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _spawn(self, name: str, command: list[str], variables: dict[str, str] | None = None) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(variables or {})},
            )


def conversions_of(pid: int) -> list[psutil.Process]:
    """The conversion processes below a process."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if "converters.process" in child.cmdline():
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found
