"""POSIX shared memory that programs register, for tensors that lie in it: objects of /dev/shm, by their key.

An object is opened once, when it is registered, and read and written with `pread` and `pwrite`, never mapped: whoever
made it may shrink it at any moment, and touching a page that is gone would end the process (SIGBUS). A tensor is copied
once either way, for its bytes must not change while the model computes. Sizes are looked up anew at every use.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from agent.serving.bad_request import BadRequestError
from agent.serving.buffers import Buffers

FOLDER = Path("/dev/shm")  # noqa: S108 (where POSIX shared memory is)
REGIONS_LIMIT = 64
TOTAL_LIMIT = 1 << 30  # bytes of all regions
TENSOR_LIMIT = 64 << 20  # bytes that are read at once
NAME_LIMIT = 255


class RegionError(BadRequestError):
    """A region can't be registered, or a tensor does not lie in one."""


@dataclass(frozen=True)
class Region:
    """One that is registered.

    Attributes:
        name: that requests call it by.
        key: of the object.
        offset: where it begins in the object, in bytes.
        size: bytes.
        descriptor: of the object, open for as long as the region is registered.
        writable: whether outputs may go there.
    """

    name: str
    key: str
    offset: int
    size: int
    descriptor: int
    writable: bool


class Regions:
    """All that are registered. Used by one event loop alone.

    Args:
        buffers: what tensors are copied into.
        folder: where the system has its objects.
    """

    def __init__(self, buffers: Buffers, folder: Path = FOLDER) -> None:
        self._buffers = buffers
        self._folder = folder
        self._regions: dict[str, Region] = {}

    def register(self, name: str, key: str, offset: int, size: int) -> Region:
        """Let requests name a part of an object; it, as it was registered.

        Raises:
            RegionError: when there is no such object that is large enough and may be read, or there are too many.
        """
        if not name or len(name) > NAME_LIMIT:
            raise RegionError(f"region: a name has 1 to {NAME_LIMIT} characters")
        if name in self._regions:
            raise RegionError(f"region {name!r} is registered: unregister it first")
        if offset < 0 or size <= 0:
            raise RegionError(f"region {name!r}: offset and byte_size are no part of an object")
        self._make_room(size)
        descriptor, writable = self._open(name, key)
        there = os.fstat(descriptor).st_size
        if offset + size > there:
            os.close(descriptor)
            raise RegionError(f"region {name!r}: byte {offset + size} is beyond the {there} bytes of {key[:100]!r}")
        region = self._regions[name] = Region(name, key, offset, size, descriptor, writable)
        return region

    def unregister(self, name: str) -> None:
        """Forget a region; one that is not registered is forgotten already."""
        region = self._regions.pop(name, None)
        if region is not None:
            os.close(region.descriptor)

    def clear(self) -> None:
        """Forget all of them."""
        for name in list(self._regions):
            self.unregister(name)

    def all(self) -> list[Region]:
        """Every region, in the order they were registered in."""
        return list(self._regions.values())

    def get(self, name: str) -> Region | None:
        """One of them."""
        return self._regions.get(name)

    def read(self, region: str, offset: int, size: int) -> memoryview:
        """A copy of some bytes of a region: its client may write the next ones when it is answered.

        Raises:
            RegionError: when they are not there.
        """
        if size > TENSOR_LIMIT:
            raise RegionError(f"shared_memory_byte_size: {size} bytes, and a tensor may have {TENSOR_LIMIT}")
        found = self._part(region, offset, size)
        content = self._buffers.take(size)
        try:
            there = os.preadv(found.descriptor, [content], found.offset + offset)
        except OSError as error:
            raise RegionError(f"region {region[:100]!r} can't be read: {error.strerror}") from None
        if there != size:
            raise _shrunk(found)
        return content

    def check(self, region: str, offset: int, size: int) -> None:
        """Refuse what does not lie in a region, or can't be written.

        Raises:
            RegionError: then.
        """
        found = self._part(region, offset, size)
        if not found.writable:
            raise RegionError(f"region {region[:100]!r} may only be read by the agent's user: no output goes there")

    def write(self, region: str, offset: int, content: bytes) -> None:
        """Put bytes into a region.

        Raises:
            RegionError: when there is no room for them.
        """
        self.check(region, offset, len(content))
        found = self._part(region, offset, len(content))
        try:
            written = os.pwrite(found.descriptor, content, found.offset + offset)
        except OSError as error:
            raise RegionError(f"region {region[:100]!r} can't be written: {error.strerror}") from None
        if written != len(content):
            raise RegionError(f"region {region[:100]!r} can't be written: there is no memory left for it")

    def _part(self, name: str, offset: int, size: int) -> Region:
        """The region that has these bytes, with the object as large as it was."""
        region = self._regions.get(name)
        if region is None:
            raise RegionError(f"shared_memory_region: {name[:100]!r} is not registered (nothing is after a restart)")
        if offset < 0 or size < 0 or offset + size > region.size:
            raise RegionError(f"region {name!r}: byte {offset + size} is beyond its {region.size} bytes")
        if region.offset + offset + size > os.fstat(region.descriptor).st_size:
            raise _shrunk(region)
        return region

    def _make_room(self, size: int) -> None:
        """Forget regions whose objects were unlinked, where there is no room with them."""
        if not self._is_room(size):
            for region in self.all():
                if os.fstat(region.descriptor).st_nlink == 0:
                    self.unregister(region.name)
        if not self._is_room(size):
            raise RegionError(
                f"{REGIONS_LIMIT} regions of {TOTAL_LIMIT} bytes together may be registered: unregister some"
            )

    def _is_room(self, size: int) -> bool:
        return len(self._regions) < REGIONS_LIMIT and sum(one.size for one in self.all()) + size <= TOTAL_LIMIT

    def _open(self, name: str, key: str) -> tuple[int, bool]:
        """The object of a key, and whether it may be written."""
        file = key.removeprefix("/")
        if not file or len(os.fsencode(file)) > NAME_LIMIT or file in {".", ".."} or "/" in file or "\0" in file:
            raise RegionError(f"region {name!r}: {key[:100]!r} is no key of shared memory, such as '/frames'")
        if file.startswith("sem."):
            raise RegionError(f"region {name!r}: {key[:100]!r} is a semaphore")
        for mode, writable in ((os.O_RDWR, True), (os.O_RDONLY, False)):
            try:
                descriptor = os.open(self._folder / file, mode | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except PermissionError:
                continue
            except OSError as error:
                raise RegionError(f"region {name!r}: {key[:100]!r} can't be opened: {error.strerror}") from None
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise RegionError(f"region {name!r}: {key[:100]!r} is no shared memory")
            return descriptor, writable
        raise RegionError(f"region {name!r}: {key[:100]!r} may not be read by the agent's user: give it the rights")


def _shrunk(region: Region) -> RegionError:
    return RegionError(f"region {region.name!r}: {region.key[:100]!r} has become smaller than it was registered")
