"""Serves artifacts that this device holds to other devices of the LAN: read-only, by digest alone, HTTP with ranges.

By mutual TLS under the fleet's CA, to devices of the same fleet. A few connections at once, each with a bound on every
wait; more are turned away, and find another source. Threads of its own; what it serves is asked for by `holds`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator

from agent.errors import AgentError
from agent.peers.request import END, HEAD_BYTES, BadRequestError, PeerRequest, parse
from agent.protocol.ranges import BeyondEndError, content_range, etag_of, wanted_range
from agent.source_config import split_place
from agent.update.bundle_file import Held
from agent.update.source_tls import organization

log = logging.getLogger("agent.peers")
CONNECTIONS = 8
HEAD_S = 5.0  # for the handshake, and for a request's head, together
IDLE_S = 20.0  # between two requests
WRITE_S = 10.0  # for one piece
PIECE = 256 * 1024
NOTHING = {"Content-Length": "0"}
REASONS = {
    200: "OK",
    206: "Partial Content",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    416: "Range Not Satisfiable",
    431: "Request Header Fields Too Large",
}


class Rate:
    """Lets so many bytes a second pass, of all connections together. Thread-safe."""

    def __init__(self, bytes_a_second: float) -> None:
        self._rate = bytes_a_second
        self._lock = threading.Lock()
        self._free_at = 0.0

    def wait(self, count: int) -> float:
        """Seconds to wait before `count` bytes may be sent."""
        with self._lock:
            now = time.monotonic()
            start = max(now, self._free_at)
            self._free_at = start + count / self._rate
            return start - now


class PeerServer:
    """The server; it listens until it is stopped.

    Args:
        place: `host:port` to listen at.
        rate_mb_s: of all that is sent, in MB a second.
        holds: where an artifact lies, by digest; called from its threads.
        context: for TLS; None for plain HTTP.
        fleet: whose devices are served; any with plain HTTP.

    Raises:
        AgentError: when the address can't be listened at.
    """

    def __init__(
        self,
        place: str,
        rate_mb_s: float,
        holds: Callable[[str], Held | None],
        context: ssl.SSLContext | None,
        fleet: str,
    ) -> None:
        self._holds = holds
        self.context = context
        self._fleet = fleet
        self._rate = Rate(rate_mb_s * 1e6)
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        self._stopping = False
        try:
            family = socket.AF_INET6 if ":" in split_place(place)[0] else socket.AF_INET
            self._listener = socket.create_server(split_place(place), family=family, backlog=16)
        except OSError as error:
            raise AgentError(f"peers.listen: {place} can't be listened at: {error.strerror}") from None
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="peers", daemon=True).start()

    def stop(self) -> None:
        """Listen no more; what is being sent ends by itself."""
        self._stopping = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while not self._stopping:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                if not self._stopping:
                    time.sleep(0.1)  # such as no file descriptors
                continue
            if not self._free.acquire(blocking=False):
                sock.close()
                continue
            threading.Thread(target=self._serve, args=(sock,), name="peer", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            until = time.monotonic() + HEAD_S
            sock.settimeout(HEAD_S)
            if self.context is not None:
                sock = self._shake_hands(sock, until)
            while not self._stopping and self._answer(sock, until):
                until = time.monotonic() + IDLE_S
        except (OSError, ValueError) as error:
            log.debug("a peer's connection ended: %s", error)
        except Exception:
            log.exception("serving a peer failed")
        finally:
            with contextlib.suppress(OSError):
                sock.close()
            self._free.release()

    def _shake_hands(self, sock: socket.socket, until: float) -> ssl.SSLSocket:
        """A timer ends it: a byte now and then would reset the socket's own time-out."""
        assert self.context is not None
        timer = threading.Timer(max(0.1, until - time.monotonic()), _shut, (sock,))
        timer.daemon = True
        timer.start()
        try:
            secure = self.context.wrap_socket(sock, server_side=True)
        finally:
            timer.cancel()
        if organization(secure) != self._fleet:
            secure.close()
            raise ValueError("it is a device of another fleet")
        return secure

    def _answer(self, sock: socket.socket, until: float) -> bool:
        """Answer one request; false when the connection is over."""
        head = _read_head(sock, until)
        if head is None:
            return False
        sock.settimeout(WRITE_S)
        try:
            request = parse(head)
        except BadRequestError as error:
            _say(sock, error.status, NOTHING)
            return False
        held = self._holds(request.digest)
        if held is None:
            _say(sock, 404, NOTHING)
            return True
        try:
            self._send(sock, request, held)
        except BeyondEndError:
            _say(sock, 416, NOTHING)
        return True

    def _send(self, sock: socket.socket, request: PeerRequest, held: Held) -> None:
        etag = etag_of(request.digest)
        span = wanted_range(request.headers, etag, held.size)
        start, count = span or (0, held.size)
        headers = {"Content-Length": str(count), "ETag": etag, "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        if span is not None:
            headers["Content-Range"] = content_range(start, count, held.size)
        descriptor = os.open(held.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _say(sock, 206 if span else 200, headers)
            for piece in _pieces(descriptor, held.offset + start, count):
                time.sleep(self._rate.wait(len(piece)))
                sock.sendall(piece)
        finally:
            os.close(descriptor)


def _pieces(descriptor: int, offset: int, count: int) -> Iterator[bytes]:
    while count:
        piece = os.pread(descriptor, min(PIECE, count), offset)
        if not piece:
            raise ValueError("the file is shorter than it was")
        yield piece
        offset, count = offset + len(piece), count - len(piece)


def _read_head(sock: socket.socket, until: float) -> bytes | None:
    """A request up to its empty line; None when there comes none in time."""
    kept = b""
    while END not in kept:
        left = until - time.monotonic()
        if left <= 0 or len(kept) > HEAD_BYTES:
            return None
        sock.settimeout(left)
        piece = sock.recv(HEAD_BYTES)
        if not piece:
            return None
        kept += piece
    return kept


def _say(sock: socket.socket, status: int, headers: dict[str, str]) -> None:
    lines = [f"HTTP/1.1 {status} {REASONS[status]}", *(f"{name}: {value}" for name, value in headers.items())]
    sock.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
