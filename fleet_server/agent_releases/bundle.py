"""What an uploaded bundle says of itself: parsed within bounds, and nothing of it is run or unpacked here."""

from __future__ import annotations

import tarfile
from pathlib import Path

import msgspec

from agent.protocol.limits import LIMITS
from agent.protocol.release import INFO, ReleaseInfo, info_problem
from fleet_server.errors import InvalidError

INFO_BYTES = 64 * 1024


def read_bundle(path: Path) -> ReleaseInfo:
    """What its first file says, which must be true of what every device checks again.

    Raises:
        InvalidError: naming what is wrong.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            first = archive.next()
            if first is None or first.name != INFO or not first.isreg() or first.size > INFO_BYTES:
                raise _refused(f"its first file is not {INFO}")
            file = archive.extractfile(first)
            assert file is not None  # it is a regular file
            content = file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise _refused(f"it is no tar: {error}") from None
    try:
        info = msgspec.json.decode(content, type=ReleaseInfo)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _refused(f"its {INFO} can't be read: {error}") from None
    problem = info_problem(info)
    if problem:
        raise _refused(f"{INFO}: {problem}")
    if path.stat().st_size > LIMITS.release_bytes:
        raise _refused(f"it has more than {LIMITS.release_bytes} bytes")
    return info


def _refused(why: str) -> InvalidError:
    return InvalidError("bad_release", f"digest: {why}: make one with `make agent-release`", field="digest")
