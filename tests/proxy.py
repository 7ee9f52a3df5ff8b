"""A network between a device and its broker that delays, cuts and swallows, as a seed says."""

from __future__ import annotations

import contextlib
import random
import selectors
import socket
import threading
import time

PIECE = 64 * 1024


class BadNetwork:
    """A TCP proxy to a port of loopback; TCP loses nothing, so what it can do is be late, end, or be half-open.

    Args:
        target: the port to connect to.
        seed: decides when a connection is cut, when a piece is late, and when what is sent is swallowed.
        cut_after_s: bounds of a connection's life, in seconds.
    """

    def __init__(self, target: int, *, seed: int, cut_after_s: tuple[float, float]) -> None:
        self._target = target
        self._chance = random.Random(seed)
        self._life = cut_after_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.cuts = self.swallowed = 0
        self.calm = False  # from then on it only passes on
        self._stopping = False
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        """Let nobody in any more."""
        self._stopping = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while not self._stopping:
            try:
                here, _ = self._listener.accept()
                there = socket.create_connection(("127.0.0.1", self._target), 5)
            except OSError:
                if self._stopping:
                    return
                time.sleep(0.05)
                continue
            for one in (here, there):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._pass, args=(here, there), daemon=True).start()

    def _pass(self, here: socket.socket, there: socket.socket) -> None:
        ends = time.monotonic() + self._chance.uniform(*self._life)
        half_open = self._chance.random() < 0.25
        watched = selectors.DefaultSelector()
        watched.register(here, selectors.EVENT_READ, there)
        watched.register(there, selectors.EVENT_READ, here)
        with here, there, watched, contextlib.suppress(OSError):
            while not self._stopping:
                over = time.monotonic() > ends and not self.calm
                if over and not half_open:
                    self.cuts += 1
                    return
                for key, _ in watched.select(0.1):
                    data = key.fileobj.recv(PIECE)  # type: ignore[union-attr]
                    if not data:
                        return
                    if over:
                        self.swallowed += len(data)
                        continue
                    if self._chance.random() < 0.05 and not self.calm:
                        time.sleep(self._chance.uniform(0.0, 0.2))
                    key.data.sendall(data)
