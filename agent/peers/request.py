"""A peer's request as it is read from a socket: hostile until it is parsed. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

import httptools

from agent.protocol.topics import DIGEST, PEER_PATH

HEAD_BYTES = 8192
END = b"\r\n\r\n"


class BadRequestError(Exception):
    """A request is refused.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, status: int) -> None:
        super().__init__(str(status))
        self.status = status


@dataclass
class PeerRequest:
    """What is asked for: a content, and the headers, by lower-case names."""

    digest: str
    headers: dict[str, str] = field(default_factory=dict)


class _Heard:
    """What the parser calls back."""

    def __init__(self) -> None:
        self.url = b""
        self.headers: dict[str, str] = {}

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")


def parse(head: bytes) -> PeerRequest:
    """Read a request's head.

    Raises:
        BadRequestError: with the status to answer; never anything else, whatever the bytes.
    """
    if len(head) > HEAD_BYTES:
        raise BadRequestError(431)
    heard = _Heard()
    parser = httptools.HttpRequestParser(heard)
    try:
        parser.feed_data(head)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        raise BadRequestError(400) from None
    path = heard.url.decode("latin-1")
    if parser.get_method() != b"GET":
        raise BadRequestError(405)
    digest = path.removeprefix(PEER_PATH)
    if not path.startswith(PEER_PATH) or not DIGEST.match(digest):
        raise BadRequestError(404)
    return PeerRequest(digest, heard.headers)
