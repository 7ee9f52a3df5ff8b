"""A tiny balancer of TCP connections before several servers: it asks each whether it is ready, as any balancer does."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import httpx

LOOK_S = 0.1


class Balancer:
    """Hands each new connection to the next server that is ready.

    Args:
        ports: of the servers, on loopback.
    """

    def __init__(self, ports: Sequence[int]) -> None:
        self._ports = list(ports)
        self._ready: set[int] = set()
        self._turns = itertools.count()
        self._over = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self._listener.getsockname()[1])
        self._threads = [threading.Thread(target=one, daemon=True) for one in (self._look, self._accept)]

    def __enter__(self) -> Self:
        for one in self._threads:
            one.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._listener.close()

    @property
    def ready(self) -> int:
        """How many servers take requests."""
        return len(self._ready)

    def _look(self) -> None:
        while not self._over.wait(LOOK_S):
            for port in self._ports:
                try:
                    ready = httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=2).status_code == 200
                except httpx.TransportError:
                    ready = False
                (self._ready.add if ready else self._ready.discard)(port)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = self._connected()
        if server is None:
            client.close()
            return
        there = threading.Thread(target=_pump, args=(client, server), daemon=True)
        there.start()
        _pump(server, client)
        there.join()
        client.close()
        server.close()

    def _connected(self) -> socket.socket | None:
        for _ in range(2 * len(self._ports)):
            ready = sorted(self._ready)
            if ready:
                with contextlib.suppress(OSError):
                    return socket.create_connection(("127.0.0.1", ready[next(self._turns) % len(ready)]), 2)
        return None


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for one in (source, target):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
