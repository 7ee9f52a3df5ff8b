"""A network peer for tests: it stands before a broker as one that speaks MQTT 3.1.1 only, on loopback."""

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
    """

    daemon_threads = True

    def __init__(self, broker_port: int, answer: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.broker_port, self.answer = broker_port, answer
        self.levels: list[int] = []

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class _Connection(socketserver.BaseRequestHandler):
    server: OldBroker

    def handle(self) -> None:
        first = self.request.recv(65536)
        if b"MQTT" not in first:
            return
        level = first[first.index(b"MQTT") + 4]
        self.server.levels.append(level)
        if level > 4:
            self.request.sendall(self.server.answer)
            return
        with socket.create_connection(("127.0.0.1", self.server.broker_port)) as broker:
            broker.sendall(first)
            back = threading.Thread(target=_pass_on, args=(broker, self.request), daemon=True)
            back.start()
            _pass_on(self.request, broker)
            back.join()


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)


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
