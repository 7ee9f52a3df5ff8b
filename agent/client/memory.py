"""Shared memory of one connection, in which large inputs lie: an object of /dev/shm that grows when it must.

Its name is removed as soon as the worker has opened it, so that nothing stays of a program that is killed. One that is
killed before leaves an object, which the next program of the same user that uses this removes.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from itertools import count
from pathlib import Path

FOLDER = Path("/dev/shm")  # noqa: S108 (where POSIX shared memory is)
PREFIX = "shoal-client-"
PAGE = mmap.PAGESIZE
MODE = 0o640  # the agent's user may be of this program's group
_numbers = count()


class SharedMemory:
    """One object.

    Args:
        folder: where the system has them.

    Attributes:
        name: of the object, and of the region that the API is told of.
        size: bytes that it has.
        registered: whether the API was told of it as it is; set it by `opened` and `forgotten`.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        self.name = f"{PREFIX}{os.getpid()}-{next(_numbers)}"
        self.size = 0
        self.registered = False
        self._path = folder / self.name
        self._map: mmap.mmap | None = None
        self._finalizer = weakref.finalize(self, _remove, self._path, os.getpid())
        _sweep(folder)

    def hold(self, parts: list[memoryview]) -> list[int]:
        """Put these one after another; where each begins.

        Raises:
            OSError: when there is no room for them.
        """
        offsets, end = [], 0
        for part in parts:
            offsets.append(end)
            end += -(-part.nbytes // 64) * 64
        if self._map is None or end > self.size:
            self._grow(end)
        assert self._map is not None
        for offset, part in zip(offsets, parts, strict=True):
            self._map[offset : offset + part.nbytes] = part
        return offsets

    def opened(self) -> None:
        """The worker has it: nobody else needs its name."""
        self.registered = True
        self._path.unlink(missing_ok=True)

    def forgotten(self) -> None:
        """The worker has it no more: it takes a new object to be opened."""
        if self._map is not None:
            self._map.close()
        self._map, self.size, self.registered = None, 0, False

    def close(self) -> None:
        """Remove the object."""
        self.forgotten()
        self._finalizer()

    def _grow(self, size: int) -> None:
        """A new object of the same name: what the API has open of the old one goes when it is told of this one."""
        wanted = max(PAGE, 1 << (size - 1).bit_length())
        self.forgotten()
        self._path.unlink(missing_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE)
        try:
            os.posix_fallocate(descriptor, 0, wanted)  # or a write would end the process where memory is short
            self._map = mmap.mmap(descriptor, wanted)
        except OSError:
            self._path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        self.size = wanted
        if not self._finalizer.alive:  # closed before
            self._finalizer = weakref.finalize(self, _remove, self._path, os.getpid())


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
