"""The head of a request that came before: who asks again and again sends the same bytes, which need no parser.

Only what any parser of HTTP/1.1 reads alike is remembered: lines that end as they must, a body whose length is said.
"""

from __future__ import annotations

from dataclasses import dataclass

from agent.serving.exchange import Request

LONGEST = 2048  # bytes of a head that is remembered
END = b"\r\n\r\n"
OTHERWISE = frozenset({"transfer-encoding", "expect", "upgrade"})  # who sends these wants more than an answer


@dataclass(frozen=True)
class SameHead:
    """A head, and what it says.

    Attributes:
        content: the line and all headers, with the empty line that ends them.
        path: with the query.
        headers: by name in lower case.
        length: bytes of the body.
    """

    content: bytes
    path: str
    headers: dict[str, str]
    length: int

    def begins(self, came: bytearray, count: int) -> bool:
        """Whether the first so many bytes are this head again, with no more behind it than its body."""
        size = len(self.content)
        return size <= count <= size + self.length and came.startswith(self.content)

    def request(self, *, local: bool) -> Request:
        """The request that it begins."""
        return Request("POST", self.path, dict(self.headers), bytearray(), keep_alive=True, local=local)


def same_head(came: bytearray, count: int, parsed: Request) -> SameHead | None:
    """What is worth remembering of bytes that the parser made one request of, and no second; None where nothing is.

    Args:
        came: begins with the request.
        count: bytes of it that came.
        parsed: what the parser made of them.
    """
    end = came.find(END, 0, min(count, LONGEST))
    headers = parsed.headers
    if end < 0 or parsed.method != "POST" or not parsed.keep_alive or not OTHERWISE.isdisjoint(headers):
        return None
    content, length = bytes(came[: end + len(END)]), headers.get("content-length", "")
    if not content.startswith(b"POST ") or content.count(b"\n") != content.count(b"\r\n") or not length.isdigit():
        return None
    if count > len(content) + int(length):
        return None
    return SameHead(content, parsed.path, dict(headers), int(length))
