"""Answers of bytes, whole or the range that was asked for."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi.responses import StreamingResponse

from agent.protocol.ranges import BeyondEndError, content_range, etag_of, wanted_range
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.errors import RangeError


def artifact_answer(store: ArtifactStore, digest: str, size: int, headers: Mapping[str, str]) -> StreamingResponse:
    """The bytes of an artifact, or the part of them that a request with these headers asks for.

    Raises:
        RangeError: when the part is beyond the end.
        UnavailableError: when the store has lost the artifact, or does not answer.
    """
    try:
        span = wanted_range(headers, etag_of(digest), size)
    except BeyondEndError:
        raise RangeError(size) from None
    start, count = span or (0, size)
    said = {"Accept-Ranges": "bytes", "ETag": etag_of(digest), "Content-Length": str(count)}
    if span is not None:
        said["Content-Range"] = content_range(start, count, size)
    pieces = (bytes(piece) for piece in (store.stream_range(digest, start, count) if span else store.stream(digest)))
    return StreamingResponse(
        pieces, status_code=206 if span else 200, media_type="application/octet-stream", headers=said
    )
