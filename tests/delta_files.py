"""Differences made by hand for tests: their operations, their frame, and the decoder on files in memory."""

from __future__ import annotations

import os

from backports import zstd

from agent.protocol.delta import HEAD, WINDOW_LOG
from agent.update.delta import decode


def frame(content: bytes, *, window_log: int = WINDOW_LOG) -> bytes:
    return zstd.compress(content, options={zstd.CompressionParameter.window_log: window_log})


def operation(kind: int, length: int, payload: bytes = b"", *, width: int = 1, changes=0, gaps=0, skip=0) -> bytes:
    return HEAD.pack(kind, width, length, changes, gaps, skip) + payload


def decoded(codec: str, encoded: bytes, base: bytes | None, size: int) -> bytes:
    """What the decoder writes; whatever it does, never more than `size` bytes."""
    files = [memory_file(encoded), memory_file(b"")] + ([] if base is None else [memory_file(base)])
    try:
        decode(codec, files[0], None if base is None else files[2], files[1], size)
        return os.pread(files[1], size + 1, 0)
    finally:
        assert os.fstat(files[1]).st_size <= size
        for file in files:
            os.close(file)


def memory_file(content: bytes) -> int:
    file = os.memfd_create("test")
    os.write(file, content)
    os.lseek(file, 0, os.SEEK_SET)
    return file
