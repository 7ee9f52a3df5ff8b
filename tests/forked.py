"""Fleet servers as processes of their own that need not import what another has: a start costs a tenth of one.

Each is forked from a process that has imported the server, made the tables of a database, and done nothing else
(`multiprocessing`'s fork server). From there on it is `shoal-server`: killed, it is as dead as any other.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from multiprocessing import get_context
from pathlib import Path

_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.forked_server"])


def _serve(environment: dict[str, str], log: str) -> None:
    """In the new process, which has this at hand; whoever starts it need not load a server."""
    from tests.forked_server import serve

    serve(environment, log)


class ForkedServer:
    """One of them, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self._process = _CONTEXT.Process(target=_serve, args=(dict(environment), str(log)), daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """How it ended; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """How it ended; None while it runs."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended.

        Raises:
            subprocess.TimeoutExpired: when it has not, in so many seconds.
        """
        self._process.join(timeout)
        status = self._process.exitcode
        if status is None:
            raise subprocess.TimeoutExpired("shoal-server", timeout or 0.0)
        return status
