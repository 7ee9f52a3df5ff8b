"""A network peer for tests, on loopback: it stands before a broker as one that speaks MQTT 3.1.1 only."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class OldBroker(socketserver.ThreadingTCPServer):
    """Passes connections by 3.1.1 on; answers others with bytes, or ends them when there are none.

    Attributes:
        levels: protocol level of every connection that came, in order.
        newest: the newest protocol level that is passed on.
        deaf: whether what clients say is dropped.
    """

    daemon_threads = True

    def __init__(self, broker_port: int, answer: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.broker_port, self.answer = broker_port, answer
        self.levels: list[int] = []
        self.newest, self.deaf = 4, False
        self._open: list[socket.socket] = []

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def cut(self) -> None:
        """End every connection."""
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def pass_on(self, client: socket.socket, first: bytes) -> None:
        with socket.create_connection(("127.0.0.1", self.broker_port)) as broker:
            self._open.append(broker)
            broker.sendall(first)
            back = threading.Thread(target=self._pump, args=(broker, client), daemon=True)
            back.start()
            self._pump(client, broker, to_broker=True)
            back.join()

    def _pump(self, source: socket.socket, sink: socket.socket, *, to_broker: bool = False) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not (to_broker and self.deaf):
                    sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)


class _Connection(socketserver.BaseRequestHandler):
    server: OldBroker

    def handle(self) -> None:
        first = self.request.recv(65536)
        if b"MQTT" not in first:
            return
        level = first[first.index(b"MQTT") + 4]
        self.server.levels.append(level)
        if level > self.server.newest:
            self.request.sendall(self.server.answer)
            return
        self.server.pass_on(self.request, first)


@contextmanager
def old_broker(broker_port: int, answer: bytes) -> Iterator[OldBroker]:
    with OldBroker(broker_port, answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
