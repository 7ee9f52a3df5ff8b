"""The embedded broker: Mosquitto as a child of the server, with a generated configuration (`broker_files`).

It dies with the server, even with one that is killed: the kernel signals it when the thread that started it ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from agent.sd_notify import VARIABLES
from fleet_server.children import die_with_parent
from fleet_server.errors import UnavailableError
from fleet_server.gateway.broker_files import BrokerFiles
from fleet_server.settings import Settings

log = logging.getLogger(__name__)
READY_S = 15.0


def find_mosquitto(name: str) -> tuple[str, dict[str, str]]:
    """The executable, and environment variables it needs.

    Raises:
        UnavailableError: naming the package when it is nowhere.
    """
    unpacked = Path(sys.prefix) / "debian" / "usr"
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if found:
        return found, {}
    inside = unpacked / "sbin" / "mosquitto"
    if name == "mosquitto" and inside.exists():
        libraries = ":".join(str(folder) for folder in sorted((unpacked / "lib").glob("*-linux-gnu*")))
        return str(inside), {"LD_LIBRARY_PATH": libraries}
    raise UnavailableError(
        "mosquitto_missing",
        f"{name!r} is not installed: apt-get install mosquitto, or name a broker of your own by SHOAL_BROKER_URL",
    )


class EmbeddedBroker:
    """Starts Mosquitto, and starts it again when it dies."""

    def __init__(self, settings: Settings, files: BrokerFiles) -> None:
        self._port = settings.broker_port
        self._host = "127.0.0.1" if settings.broker_host in {"0.0.0.0", "::"} else settings.broker_host  # noqa: S104
        self._files = files
        self._folder = files.folder
        self._executable, self._environment = find_mosquitto(settings.mosquitto)
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._keeper: threading.Thread | None = None
        self._failed: UnavailableError | None = None
        self._ready = threading.Event()

    def start(self) -> None:
        """Start, and return when it accepts connections.

        Raises:
            UnavailableError: when the port is taken, or it ends at once.
        """
        self._files.write_configuration()
        self._await_free_port()
        self._keeper = threading.Thread(target=self._keep, name="broker-keeper", daemon=True)
        self._keeper.start()
        self._ready.wait(READY_S + 5)
        if self._failed is not None or not self._ready.is_set():
            self.stop()
            raise self._failed or UnavailableError("broker", "the embedded broker did not start")

    def stop(self) -> None:
        """End it."""
        self._stopping.set()
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            if process.poll() is None:
                process.kill()
        if self._keeper is not None:
            self._keeper.join(10)

    def reload(self) -> None:
        """Let it read its certificates, revocations and access list again; connections stay."""
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGHUP)

    @property
    def pid(self) -> int | None:
        """Of the running broker."""
        return self._process.pid if self._process is not None else None

    def _await_free_port(self) -> None:
        """A broker of a killed server may need a moment to die."""
        deadline = time.monotonic() + 5
        while _answers(self._host, self._port):
            if time.monotonic() > deadline:
                raise UnavailableError(
                    "broker_port_taken",
                    f"port {self._port} is taken by another program: set SHOAL_BROKER_PORT to a free one, or "
                    "SHOAL_BROKER_URL to use the broker that is there",
                )
            time.sleep(0.1)

    def _keep(self) -> None:
        delay = 0.2
        while not self._stopping.is_set():
            started = time.monotonic()
            self._spawn()
            assert self._process is not None
            if self._stopping.is_set():
                # `stop` looked before it was there.
                self._process.terminate()
            if not self._ready.is_set():
                self._await_ready()
            status = self._process.wait()
            if self._stopping.is_set() or self._failed is not None:
                return
            delay = 0.2 if time.monotonic() - started > 60 else min(delay * 2, 10)
            log.error("the embedded broker ended with %s; starting it again in %.1f s", status, delay)
            self._stopping.wait(delay)

    def _spawn(self) -> None:
        with (self._folder / "mosquitto.log").open("ab") as output:
            self._process = subprocess.Popen(
                [self._executable, "-c", str(self._folder / "mosquitto.conf")],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**_without_manager(os.environ), **self._environment},
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509 (one C call, made before exec)
            )

    def _await_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline and self._process.poll() is None:
            if _answers(self._host, self._port):
                self._ready.set()
                return
            time.sleep(0.02)
        tail = (self._folder / "mosquitto.log").read_text(errors="replace")[-500:]
        self._failed = UnavailableError("broker", f"the embedded broker did not start: {tail}")
        self._process.kill()
        self._ready.set()


def _without_manager(environment: Mapping[str, str]) -> dict[str, str]:
    """Mosquitto knows sd_notify too, and would say that the server is ready when it is."""
    return {name: value for name, value in environment.items() if name not in VARIABLES}


def _answers(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False
