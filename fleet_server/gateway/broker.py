"""The embedded broker: Mosquitto as a child of the server, on loopback only, with a generated configuration.

It dies with the server, even with one that is killed: the kernel signals it when the thread that started it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from fleet_server.errors import UnavailableError
from fleet_server.settings import Settings

log = logging.getLogger(__name__)
READY_S = 15.0
PR_SET_PDEATHSIG = 1
CONFIGURATION = """\
# Written by Shoal at every start; changes are lost.
listener {port} 127.0.0.1
allow_anonymous true
persistence true
persistence_location {folder}/
autosave_interval 5
max_inflight_messages 200
max_queued_messages 100000
max_packet_size 2097152
sys_interval 0
log_dest stderr
log_type error
log_type warning
"""


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

    def __init__(self, settings: Settings) -> None:
        self._port = settings.broker_port
        self._folder = (settings.state_dir / "broker").absolute()
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
        self._folder.mkdir(parents=True, exist_ok=True)
        configuration = CONFIGURATION.format(port=self._port, folder=self._folder)
        (self._folder / "mosquitto.conf").write_text(configuration)
        if os.geteuid() == 0:
            # Started by root, Mosquitto becomes the user `mosquitto` where there is one; the state stays root's.
            with (self._folder / "mosquitto.conf").open("a") as file:
                file.write("user root\n")
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

    @property
    def pid(self) -> int | None:
        """Of the running broker."""
        return self._process.pid if self._process is not None else None

    def _await_free_port(self) -> None:
        """A broker of a killed server may need a moment to die."""
        deadline = time.monotonic() + 5
        while _answers(self._port):
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
                env={**os.environ, **self._environment},
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 (one C call, made before exec)
            )

    def _await_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline and self._process.poll() is None:
            if _answers(self._port):
                self._ready.set()
                return
            time.sleep(0.02)
        tail = (self._folder / "mosquitto.log").read_text(errors="replace")[-500:]
        self._failed = UnavailableError("broker", f"the embedded broker did not start: {tail}")
        self._process.kill()
        self._ready.set()


_LIBC = ctypes.CDLL(None)


def _die_with_parent() -> None:
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
