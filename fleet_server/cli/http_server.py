"""uvicorn's server as `shoal-server` runs it: it tells who started it how it is, and lets followers go at its end."""

from __future__ import annotations

import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from agent.sd_notify import ServiceManager


class HttpServer(uvicorn.Server):
    """Says that it is ready, and then that its event loop goes round.

    Args:
        config: uvicorn's.
        manager: told how it is.
        let_go: ends streams that would go on for ever: called when it is told to end, before it waits for everybody.
    """

    def __init__(self, config: uvicorn.Config, manager: ServiceManager, let_go: Callable[[], object]) -> None:
        super().__init__(config)
        self._manager = manager
        self._let_go = let_go

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        if self.started:
            self._manager.ready()

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second by the event loop."""
        self._manager.alive()
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """It was told to end."""
        self._manager.stopping()
        self._let_go()
        super().handle_exit(sig, frame)
