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
