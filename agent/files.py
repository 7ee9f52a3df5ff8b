"""How the agent writes files that must survive a power cut: whole or not at all. It knows nothing of what is in them.

A file is written under a name of its own, synced, renamed, and the folder synced: after that, and not before, it is
there. A crash in between leaves the old file and a `.tmp` beside it, which `remove_leftovers` takes away.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import Path

from agent.protocol.errors import WireErrorCode

SUFFIX = ".tmp"
STORAGE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO})  # the disk's own
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def write_durably(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Write a file; once this returns, a power cut leaves the new content, and before it the old or the new.

    Raises:
        OSError: when it can't be written; the old content is still there then.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}{SUFFIX}")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def rename_durably(source: Path, target: Path) -> None:
    """Give a file that was synced its name.

    Raises:
        OSError: when it can't be.
    """
    source.replace(target)
    sync_folder(target.parent)


def remove_durably(path: Path) -> None:
    """Remove a file that may be there.

    Raises:
        OSError: when it can't be.
    """
    path.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make what was made, renamed and removed in a folder survive a power cut.

    Raises:
        OSError: when it can't be.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_aside(path: Path, *, keep: int = 2) -> Path:
    """Rename a damaged file, so that a fresh one can be made and people can still look at the old.

    Args:
        path: of the file; what SQLite keeps beside it goes along.
        keep: how many that were set aside earlier may stay.

    Returns:
        Where it is now.

    Raises:
        OSError: when it can't be renamed.
    """
    earlier = sorted(path.parent.glob(f"{path.name}.corrupt-*"), key=lambda one: one.stat().st_mtime_ns)
    for old in earlier[: max(len(earlier) - keep + 1, 0)]:
        old.unlink(missing_ok=True)
    name = f"{path.name}.corrupt-{int(time.time())}"
    target = path.with_name(name)
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{name}-{number}")
    for beside in (
        "-wal",
        "-shm",
        "-journal",
    ):  # of no use without the file they belong to, and dangerous beside another
        path.with_name(path.name + beside).unlink(missing_ok=True)
    rename_durably(path, target)
    return target


def storage_code(error: OSError) -> WireErrorCode:
    """What an error of the disk is called on the wire."""
    return WireErrorCode.DISK_FULL if error.errno in {errno.ENOSPC, errno.EDQUOT} else WireErrorCode.STORE_ERROR


def remove_leftovers(folder: Path) -> None:
    """Take away what writers that are gone left half-written; what can't be removed stays."""
    with contextlib.suppress(OSError):
        for left in folder.glob(f".*{SUFFIX}"):
            writer = left.name.removesuffix(SUFFIX).rpartition(".")[2]
            if writer == str(os.getpid()) or not (writer.isdigit() and Path("/proc", writer).exists()):
                left.unlink(missing_ok=True)


def boot_id() -> bytes:
    """16 bytes that are others after each start of the machine: what was written since then is in its memory at least.

    Empty where the system does not say.
    """
    try:
        return bytes.fromhex(BOOT_ID.read_text().strip().replace("-", ""))
    except (OSError, ValueError):
        return b""
