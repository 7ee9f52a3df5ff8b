"""Shared memory of one connection, in which large tensors lie: an object of /dev/shm, another when it must be larger.

Its name is removed as soon as the worker has opened it, so that nothing stays of a program that is killed. One that is
killed before leaves an object, which the next program of the same user that uses this removes. A name is used once: the
worker may still write the outputs of a request that was given up to what it knows by that name.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

FOLDER = Path("/dev/shm")  # noqa: S108 (where POSIX shared memory is)
PREFIX = "shoal-client-"
PAGE = mmap.PAGESIZE
MODE = 0o640  # the agent's user may be of this program's group, and then reads inputs alone
_numbers = count()


class SharedMemory:
    """One object at a time.

    Args:
        folder: where the system has them.

    Attributes:
        name: of the object, and of the region that the API is told of.
        size: bytes that it has.
        registered: whether the API knows it.
        writable: whether the API may put outputs there.
        stale: names that the API may still know, and need not.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        self.name = ""
        self.size = 0
        self.registered = False
        self.writable = True
        self.stale: list[str] = []
        self._folder = folder
        self._map: mmap.mmap | None = None
        self._remove: Callable[[], object] = lambda: None
        _sweep(folder)

    def hold(self, parts: Sequence[memoryview], room: Sequence[int] = ()) -> list[int]:
        """Put these one after another, and leave room behind them; where each part, and each room, begins.

        Raises:
            OSError: when there is no memory for them.
        """
        offsets, end = [], 0
        for size in (*(part.nbytes for part in parts), *room):
            offsets.append(end)
            end += -(-size // 64) * 64
        if self._map is None or end > self.size:
            self._make(end)
        assert self._map is not None
        for offset, part in zip(offsets, parts, strict=False):
            self._map[offset : offset + part.nbytes] = part
        return offsets

    def read(self, offset: int, size: int) -> bytearray:
        """A copy of some bytes."""
        assert self._map is not None
        return bytearray(memoryview(self._map)[offset : offset + size])

    def opened(self, *, writable: bool) -> None:
        """The worker has it: nobody else needs its name."""
        self.registered, self.writable = True, writable
        self._remove()

    def forgotten(self) -> None:
        """The worker has it no more: it takes a new object to be opened."""
        if self._map is not None:
            self._map.close()
            self._remove()
        self._map, self.size, self.registered = None, 0, False

    def abandon(self) -> None:
        """What the worker has of it may still be written: another object takes its place."""
        if self._map is not None:
            self.stale.append(self.name)
        self.forgotten()

    def _make(self, size: int) -> None:
        wanted = max(PAGE, 1 << (size - 1).bit_length())
        self.abandon()
        self.name = f"{PREFIX}{os.getpid()}-{next(_numbers)}"
        path = self._folder / self.name
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE)
        try:
            os.posix_fallocate(descriptor, 0, wanted)  # or a write would end the process where memory is short
            self._map = mmap.mmap(descriptor, wanted)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        self.size = wanted
        self._remove = weakref.finalize(self, _remove, path, os.getpid())


def _remove(path: Path, owner: int) -> None:
    """Remove an object, unless this is a child that was forked with it."""
    if os.getpid() == owner:
        path.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove objects of this user's programs that were killed."""
    for path in folder.glob(f"{PREFIX}*"):
        owner = path.name.removeprefix(PREFIX).partition("-")[0]
        with contextlib.suppress(OSError):  # gone by now, or not ours
            if owner.isdigit() and not Path(f"/proc/{owner}").exists() and path.stat().st_uid == os.geteuid():
                path.unlink()
