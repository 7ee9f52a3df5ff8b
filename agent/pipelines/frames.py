"""JPEG frames out of ffmpeg's `mpjpeg` format: headers with a length, then so many bytes. Pure, and bounded."""

from __future__ import annotations

from collections.abc import Iterator

LONGEST_HEAD = 4096
DIGITS = 9


class FrameError(Exception):
    """The bytes are no such stream."""


class FrameReader:
    """Takes bytes as they come.

    Args:
        limit: bytes of a frame.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept = bytearray()
        self._size: int | None = None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The frames that are whole now.

        Raises:
            FrameError: when it is no such stream, or a frame is too large.
        """
        self._kept += data
        while True:
            if self._size is None and not self._head():
                return
            assert self._size is not None
            if len(self._kept) < self._size:
                return
            frame = bytes(memoryview(self._kept)[: self._size])
            del self._kept[: self._size]
            self._size = None
            yield frame

    def _head(self) -> bool:
        """Read headers, when they are all there."""
        end = self._kept.find(b"\r\n\r\n", 0, LONGEST_HEAD)
        if end < 0:
            if len(self._kept) >= LONGEST_HEAD:
                raise FrameError("ffmpeg sent no headers of a frame")
            return False
        lengths = [
            line.partition(b":")[2].strip()
            for line in bytes(self._kept[:end]).split(b"\r\n")
            if line.lower().startswith(b"content-length:")
        ]
        if len(lengths) != 1 or not (lengths[0].isdigit() and len(lengths[0]) <= DIGITS):
            raise FrameError("ffmpeg sent a frame without a length")
        size = int(lengths[0])
        if not 0 < size <= self._limit:
            raise FrameError(f"a frame has {size} bytes, and may have {self._limit}: ask for smaller ones")
        del self._kept[: end + 4]
        self._size = size
        return True
