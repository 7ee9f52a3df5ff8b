"""A thread of the server that does one thing over and over."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from fleet_server.errors import FleetError

log = logging.getLogger(__name__)


class Ticker:
    """Calls a function now and then until it is stopped; a call that fails is logged, and the next one comes.

    Args:
        name: of the thread, and in the log.
        tick: what is done.
        every_s: seconds of rest between two calls.
        at_once: whether the first comes without a rest.
    """

    def __init__(self, name: str, tick: Callable[[], object], every_s: float, *, at_once: bool = False) -> None:
        self._name = name
        self._tick = tick
        self._every_s = every_s
        self._at_once = at_once
        self._stopping = threading.Event()
        self._woken = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def stopping(self) -> bool:
        """Whether it was told to stop; a tick that does much looks now and then."""
        return self._stopping.is_set()

    def start(self) -> None:
        """Begin to tick."""
        self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
        self._thread.start()

    def stop(self, wait_s: float = 30.0) -> None:
        """Let the present call be the last, and wait so long for its end."""
        self._stopping.set()
        self._woken.set()
        if self._thread is not None:
            self._thread.join(wait_s)

    def wake(self) -> None:
        """Let the next call come now."""
        self._woken.set()

    def rest(self, seconds: float) -> bool:
        """Rest within a tick; true when it was told to stop meanwhile."""
        return self._stopping.wait(seconds)

    def call(self) -> None:
        """One tick, in the caller's thread; whatever comes of it is logged."""
        try:
            self._tick()
        except FleetError as error:
            log.error("%s: %s; it goes on", self._name, error.detail)  # noqa: TRY400 (a sentence for people)
        except Exception:
            log.exception("a tick of the %s failed; it goes on", self._name)

    def _loop(self) -> None:
        if not self._at_once:
            self._woken.wait(self._every_s)
        while not self._stopping.is_set():
            self._woken.clear()  # before the call: what wakes it meanwhile is not forgotten
            self.call()
            self._woken.wait(self._every_s)
