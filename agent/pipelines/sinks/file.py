"""JSON lines in a file, each once.

What was written before a kill is found again by its id, and a torn line is cut off.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from agent.files import sync_folder
from agent.pipelines.config import FileSink
from agent.pipelines.outbox import Kept
from agent.pipelines.sinks.sink import SinkError

PIECE = 1 << 20


class File:
    """The sink.

    Args:
        config: of it.
    """

    batch = 100

    def __init__(self, config: FileSink) -> None:
        self._config = config
        self._path = Path(config.path)
        self._limit = int(config.max_mb * 2**20)
        self._descriptor: int | None = None
        self._written: set[str] = set()  # ids of the newest batch, which may not have been confirmed

    def send(self, events: Sequence[Kept]) -> None:
        """Append lines, and sync them."""
        try:
            descriptor = self._open()
            lines = b"".join(one.body + b"\n" for one in events if one.id not in self._written)
            before = os.fstat(descriptor).st_size
            if before and before + len(lines) > self._limit and lines:
                self.close()
                self._rotate()
                descriptor, before = self._open(), 0
            try:
                self._append(descriptor, lines)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, before)
                raise
        except OSError as error:
            self.close()
            raise SinkError(
                f"{self._path} can't be written: {error.strerror}; make its folder, or free space"
            ) from None
        self._written = {one.id for one in events}

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _append(self, descriptor: int, lines: bytes) -> None:
        view = memoryview(lines)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)

    def _open(self) -> int:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                if os.path.samestat(self._path.stat(), os.fstat(self._descriptor)):
                    return self._descriptor
            self.close()  # somebody moved it away, such as logrotate
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self._path, flags, 0o640)
        try:
            self._recover(descriptor)
            sync_folder(self._path.parent)
        except OSError:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return descriptor

    def _recover(self, descriptor: int) -> None:
        """Cut a torn last line off; know the ids of the last batch."""
        end, tail = os.fstat(descriptor).st_size, b""
        start = end
        while start and tail.count(b"\n") <= self.batch:
            first = max(start - PIECE, 0)
            tail = os.pread(descriptor, start - first, first) + tail
            start = first
        whole = tail.rfind(b"\n") + 1
        if whole < len(tail):
            os.ftruncate(descriptor, start + whole)
        for line in tail[:whole].splitlines()[-self.batch :]:
            with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                told: Any = msgspec.json.decode(line)
                if isinstance(told, dict):
                    self._written.add(str(told.get("id")))

    def _rotate(self) -> None:
        """`path` becomes `path.1`, that `path.2`, and so on; the oldest goes."""
        names = [self._path.with_name(f"{self._path.name}.{number}") for number in range(1, self._config.keep + 1)]
        for older, newer in zip(reversed(names), [*reversed(names[:-1]), self._path], strict=True):
            with contextlib.suppress(FileNotFoundError):
                newer.replace(older)
