"""Reads chunks over HTTP with ranges: from the fleet server, a mirror, or a peer. It runs in a transfer's thread.

The other side may be anybody: lengths are checked, redirects bounded, every wait has an end, and no more than a chunk
is kept. Whether bytes are right is judged elsewhere, when all are there.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from urllib.parse import urljoin, urlsplit

from agent.protocol.manifest import Content, chunk_count
from agent.protocol.messages import ChunkRange
from agent.protocol.ranges import parse_content_range
from agent.update.source_tls import organization
from agent.update.transfer import Address, SourceError, Stop

CONNECT_S = 5.0
WAIT_S = 10.0  # between two pieces
CHUNK_S = 60.0  # for a whole chunk, and for the head of an answer
REDIRECTS = 3
PIECE = 65536
MOVED = (301, 302, 303, 307, 308)
GONE = (404, 410)


def read_http(
    address: Address, content: Content, spans: Sequence[ChunkRange], stop: Stop
) -> Iterator[tuple[int, bytes]]:
    """Chunks of the spans, in order; more, where the server knows no ranges and sends everything.

    Raises:
        SourceError: when it does not go on; what came before counts.
    """
    try:
        for span in spans:
            answer = HttpAnswer(*_open(address, _bytes_of(content, span), stop), content, span)
            try:
                yield from answer.chunks()
            finally:
                answer.close()
            if answer.whole:
                return
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise SourceError(f"{_place(address.url)}: {str(error) or type(error).__name__}") from None


def _bytes_of(content: Content, span: ChunkRange) -> tuple[int, int]:
    start = span.first * content.chunk_size
    return start, min((span.last + 1) * content.chunk_size, content.size) - start


def _open(
    address: Address, span: tuple[int, int], stop: Stop
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """The answer to a request for a range, after redirects."""
    headers = {
        "Range": f"bytes={span[0]}-{span[0] + span[1] - 1}",
        "Accept-Encoding": "identity",
        "User-Agent": "shoal-agent",
    }
    for _ in range(REDIRECTS + 1):
        connection, path = _connect(address, stop)
        ticket = {"Authorization": f"Bearer {address.ticket}"} if address.ticket else {}
        try:
            connection.request("GET", path, headers=headers | ticket)
            response = connection.getresponse()
            if response.status in {200, 206}:
                return connection, response
            address = _next(address, response)
        except BaseException:
            connection.close()
            raise
        connection.close()
    raise SourceError(f"{_place(address.url)} redirects more than {REDIRECTS} times")


def _next(address: Address, response: http.client.HTTPResponse) -> Address:
    """Where a redirect leads; anything else is an error."""
    if response.status in GONE:
        raise SourceError(f"{_place(address.url)} does not have it", absent=True)
    target = response.getheader("Location", "")
    if response.status not in MOVED or not target:
        raise SourceError(f"{_place(address.url)} answered {response.status}")
    url = urljoin(address.url, target)
    before, after = urlsplit(address.url), urlsplit(url)
    if after.scheme != "https" and not (address.plain and after.scheme == "http"):
        raise SourceError(f"{_place(address.url)} redirects to {after.scheme[:20]!r}, where only https will do")
    same = (before.scheme, before.netloc) == (after.scheme, after.netloc)
    return replace(address, url=url, ticket=address.ticket if same else "")


def _connect(address: Address, stop: Stop) -> tuple[http.client.HTTPConnection, str]:
    parts = urlsplit(address.url)
    host, secure = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    sock: socket.socket = socket.create_connection((host, port), timeout=CONNECT_S)
    try:
        stop.watch(sock)
        if secure:
            context = address.context or ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=address.server_name or host)
            stop.watch(sock)
            _check_organization(sock, address)
    except BaseException:
        sock.close()
        raise
    sock.settimeout(WAIT_S)
    connection = http.client.HTTPConnection(host, port, timeout=WAIT_S)
    connection.sock = sock
    path = parts.path or "/"
    return connection, f"{path}?{parts.query}" if parts.query else path


def _check_organization(sock: socket.socket, address: Address) -> None:
    """Fleets of one server share its CA: a peer must be of the same one."""
    if address.organization and isinstance(sock, ssl.SSLSocket) and organization(sock) != address.organization:
        raise SourceError(f"{_place(address.url)} is a device of another fleet")


class HttpAnswer:
    """The body of an answer: the part that was asked for, or all, where the server knows no ranges."""

    def __init__(
        self,
        connection: http.client.HTTPConnection,
        response: http.client.HTTPResponse,
        content: Content,
        span: ChunkRange,
    ) -> None:
        self._connection = connection
        self._response = response
        self._content = content
        self.whole = response.status == 200
        try:
            self._first, self._last = self._check(span)
        except BaseException:
            self.close()
            raise

    def _check(self, span: ChunkRange) -> tuple[int, int]:
        """The chunks that will come."""
        said = self._response.getheader("Content-Length")
        length = int(said) if said is not None and said.isascii() and said.isdigit() and len(said) < 19 else None
        if self._response.getheader("Content-Encoding", "identity") != "identity":
            raise SourceError("the server encodes what is to come as it is")
        if self.whole:
            if length not in {None, self._content.size}:
                raise SourceError(f"the server has {length} bytes under this name, not {self._content.size}")
            return 0, chunk_count(self._content) - 1
        start, count = _bytes_of(self._content, span)
        found = parse_content_range(self._response.getheader("Content-Range", ""))
        if found is None or found[:2] != (start, count) or found[2] not in {None, self._content.size}:
            raise SourceError("the server sends another range than it was asked for")
        if length not in {None, count}:
            raise SourceError(f"the server announces {length} bytes for a range of {count}")
        return span.first, span.last

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        """Each chunk with its index, as it comes."""
        for index in range(self._first, self._last + 1):
            start = index * self._content.chunk_size
            yield index, self._exactly(min(self._content.chunk_size, self._content.size - start))
        if self.whole and self._response.getheader("Content-Length") is None and self._response.read1(1):
            raise SourceError("the server sends more bytes than the content has")

    def _exactly(self, size: int) -> bytes:
        until = time.monotonic() + CHUNK_S
        kept = bytearray()
        while len(kept) < size:
            piece = self._response.read1(min(PIECE, size - len(kept)))
            if not piece:
                raise SourceError("the server ended in the middle")
            kept += piece
            if time.monotonic() > until:
                raise SourceError(f"a chunk took longer than {CHUNK_S:.0f} s")
        return bytes(kept)

    def close(self) -> None:
        """End the connection."""
        self._response.close()
        self._connection.close()


def _place(url: str) -> str:
    """A URL as it may be logged: queries hold signatures."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"[:200]
