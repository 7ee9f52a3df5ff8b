"""Tells systemd how this process is (sd_notify(3)): that it is ready, that it lives, that it ends.

Both daemons use it. It is a datagram of text to the socket that `NOTIFY_SOCKET` names; where nothing is named, nobody
asks and nothing is done. It imports what a daemon has imported anyhow.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Mapping

VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")  # a child that heeds them would speak in our name
PINGS_PER_DEADLINE = 4  # systemd counts from the last one that it got: a late one or two do no harm


class ServiceManager:
    """Whoever started this process and watches it, if anybody does.

    Args:
        environment: such as `os.environ`; `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID` are read.
        clock: seconds that never go back.
    """

    def __init__(self, environment: Mapping[str, str], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._address = _address(environment.get("NOTIFY_SOCKET", ""))
        self._every_s = _deadline_s(environment) / PINGS_PER_DEADLINE
        self._due = clock()

    @property
    def rest_s(self) -> float:
        """How long the main loop may rest before it is to say that it lives, in seconds; for ever where nobody asks."""
        return max(0.0, self._due - self._clock()) if self._every_s else math.inf

    def ready(self) -> None:
        """What was begun at the start works."""
        self._say("READY=1")

    def alive(self) -> None:
        """The main loop has come round once more; systemd is told now and then, where it wants to be."""
        if self._every_s and self._clock() >= self._due:
            self._due = self._clock() + self._every_s
            self._say("WATCHDOG=1")

    def stopping(self) -> None:
        """It ends because it was told to."""
        self._say("STOPPING=1")

    def _say(self, text: str) -> None:
        if self._address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.sendto(text.encode(), socket.MSG_DONTWAIT, self._address)
        except OSError:
            pass  # a daemon works on without its manager


def _address(name: str) -> str | None:
    """A path, or a name in the abstract namespace; None for none and for kinds that are no Unix sockets."""
    if name.startswith("@"):
        return "\0" + name[1:]
    return name if name.startswith("/") else None


def _deadline_s(environment: Mapping[str, str]) -> float:
    """How long systemd waits for a sign of life, in seconds; 0 where it waits for none, or for another process's."""
    given = environment.get("WATCHDOG_USEC", "")
    whose = environment.get("WATCHDOG_PID", "")
    if not (given.isascii() and given.isdigit()) or (whose and whose != str(os.getpid())):
        return 0.0
    return int(given) / 1e6
