"""uvicorn's server as `shoal-server` runs it: it tells who started it how it is, and ends in an orderly way."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn

from agent.sd_notify import ServiceManager
from fleet_server.draining import Drain


class HttpServer(uvicorn.Server):
    """Says that it is ready, and then that its event loop goes round.

    Args:
        config: uvicorn's.
        manager: told how it is.
        let_go: ends streams that would go on for ever: called when it is told to end, before it waits for everybody.
        drain: begun when it is told to end.
        drain_s: for so many seconds it answers then; being told again ends that.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        manager: ServiceManager,
        let_go: Callable[[], object],
        drain: Drain,
        drain_s: float,
    ) -> None:
        super().__init__(config)
        self._manager = manager
        self._let_go = let_go
        self._drain, self._drain_s = drain, drain_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        if self.started:
            self._manager.ready()

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second by the event loop."""
        self._manager.alive()
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """It was told to end: it answers for a while yet, where that is wanted."""
        self._manager.stopping()
        again, self._drain.begun = self._drain.begun, True
        if self._drain_s and not again:
            timer = threading.Timer(self._drain_s, self._end, (sig,))
            timer.daemon = True
            timer.start()
        else:
            self._end(sig)

    def _end(self, sig: int) -> None:
        self._let_go()
        super().handle_exit(sig, None)
