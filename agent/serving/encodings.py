"""Compressed bodies: `gzip` and `deflate` of Content-Encoding and Accept-Encoding. Pure."""

from __future__ import annotations

import zlib

_WINDOWS = {"gzip": 31, "deflate": 15}  # of zlib: with gzip's frame, and with its own
FASTEST = 1


class EncodingError(Exception):
    """A body can't be expanded.

    Attributes:
        status: of HTTP, that says so.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def expand(body: bytes | bytearray, encoding: str, limit: int) -> bytes:
    """A body as it was before it was compressed.

    Args:
        body: as it came.
        encoding: of the header Content-Encoding.
        limit: bytes that it may have.

    Raises:
        EncodingError: 415 for an encoding that is not known, 413 for more bytes than the limit, 400 for damage.
    """
    window = _WINDOWS.get(encoding)
    if window is None:
        raise EncodingError(415, f"Content-Encoding: {encoding[:100]!r} is not taken, but {', '.join(_WINDOWS)}")
    expander = zlib.decompressobj(window)
    try:
        found = expander.decompress(body, limit + 1)
    except zlib.error as error:
        raise EncodingError(400, f"Content-Encoding: the body is no {encoding}: {error}") from None
    if len(found) > limit:
        raise EncodingError(413, f"a body may have {limit} bytes when it is expanded")
    if not expander.eof or expander.unused_data:
        raise EncodingError(400, f"Content-Encoding: the body is no whole {encoding}")
    return found


def compress(body: bytes, encoding: str) -> bytes:
    """A body in one of the encodings, fast rather than small."""
    compressor = zlib.compressobj(FASTEST, zlib.DEFLATED, _WINDOWS[encoding])
    return compressor.compress(body) + compressor.flush()


def chosen(accepted: str) -> str | None:
    """The first encoding of the header Accept-Encoding that can be made; None for none."""
    for one in accepted.lower().split(","):
        name, _, quality = one.partition(";")
        if name.strip() in _WINDOWS and quality.replace(" ", "") not in {"q=0", "q=0.0", "q=0.00", "q=0.000"}:
            return name.strip()
    return None
