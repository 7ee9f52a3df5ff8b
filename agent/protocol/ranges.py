"""One range of bytes of an HTTP request (RFC 9110, section 14), as both the server and devices serve it. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})", re.ASCII)
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", re.ASCII)


class BeyondEndError(ValueError):
    """The range begins beyond the end."""


def etag_of(digest: str) -> str:
    """What `ETag` and `If-Range` say of a content."""
    return f'"{digest}"'


def wanted_range(headers: Mapping[str, str], etag: str, size: int) -> tuple[int, int] | None:
    """First byte and count that a request asks for; None for all of it, as for several ranges at once.

    Args:
        headers: of the request, by lower-case names.
        etag: of what is there now: a range of something else is none.
        size: bytes that there are.

    Raises:
        BeyondEndError: when there are no such bytes.
    """
    match = _RANGE.fullmatch(headers.get("range", "").replace(" ", ""))
    if match is None or headers.get("if-range", etag) != etag:
        return None
    first, last = match.groups()
    if not first and not last:
        return None
    if not first:
        start, end = max(0, size - int(last)), size
    elif last and int(last) < int(first):
        return None
    else:
        start, end = int(first), min(int(last) + 1, size) if last else size
    if start >= end:
        raise BeyondEndError
    return start, end - start


def content_range(start: int, count: int, size: int) -> str:
    """The header of an answer that is a part."""
    return f"bytes {start}-{start + count - 1}/{size}"


def parse_content_range(text: str) -> tuple[int, int, int | None] | None:
    """First byte, count and whole size (None where it is not said) of such a header; None when it is none."""
    match = _CONTENT_RANGE.fullmatch(text)
    if match is None or int(match[2]) < int(match[1]):
        return None
    return int(match[1]), int(match[2]) - int(match[1]) + 1, None if match[3] == "*" else int(match[3])
