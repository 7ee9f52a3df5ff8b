"""Both daemons as systemd starts and watches them: ready when they are, alive as long as their main loops go round."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.fleet import AGENT, free_port, wait_until
from tests.forked import ForkedServer

DEADLINE_S = 4.0  # of the watchdog; a sign of life is due every second
SOON_S = 30.0  # on a busy machine
Daemon = subprocess.Popen[bytes] | ForkedServer


class Systemd:
    """The socket that it gives a service, and what came by it."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(str(path))
        self.variables = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": str(int(DEADLINE_S * 1e6))}

    def close(self) -> None:
        self.sock.close()

    def hear(self, seconds: float) -> str | None:
        """The next message, if one comes in that time."""
        self.sock.settimeout(seconds)
        try:
            return self.sock.recv(4096).decode()
        except (TimeoutError, BlockingIOError):
            return None


@contextmanager
def started(name: str, folder: Path, systemd: Systemd) -> Iterator[Daemon]:
    process: Daemon
    environment = {**os.environ, **systemd.variables}
    if name == "agent":
        environment |= {
            "SHOAL_AGENT_STATE_DIR": str(folder / "state"),
            "SHOAL_AGENT_BROKER": f"mqtt://127.0.0.1:{free_port()}",  # nobody is there: it lives on
            "SHOAL_AGENT_LISTEN": "127.0.0.1:0",
        }
        with (folder / "log").open("wb") as output:
            process = subprocess.Popen([*AGENT, "run"], env=environment, stdout=output, stderr=output)
    else:
        environment |= {
            "SHOAL_STATE_DIR": str(folder / "state"),
            "SHOAL_PORT": str(free_port()),
            "SHOAL_BROKER_PORT": str(free_port()),
        }
        process = ForkedServer(environment, folder / "log")
    try:
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", ["agent", "server"])
def test_it_is_ready_lives_is_seen_to_hang_and_says_that_it_ends(name: str, tmp_path: Path) -> None:
    with closing(Systemd(tmp_path / "notify")) as systemd, started(name, tmp_path, systemd) as process:
        said = lambda: (tmp_path / "log").read_text()[-2000:]  # noqa: E731
        assert systemd.hear(2 * SOON_S) == "READY=1", said()
        # The server's broker, which knows this socket's protocol too, does not speak in its name.
        assert [systemd.hear(SOON_S) for _ in range(3)] == ["WATCHDOG=1"] * 3, said()
        process.send_signal(signal.SIGSTOP)
        while systemd.hear(0.0) is not None:
            pass
        assert systemd.hear(1.5) is None, "what hangs says nothing: systemd would start it again"
        process.send_signal(signal.SIGCONT)
        assert systemd.hear(SOON_S) == "WATCHDOG=1"
        process.send_signal(signal.SIGTERM)
        wait_until("its last word", lambda: systemd.hear(1.0) == "STOPPING=1", 20)
        assert process.wait(30) in {0, -signal.SIGTERM}, said()
