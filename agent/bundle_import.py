"""`shoal-agent bundle import`: copies a bundle into the state folder, of its artifacts those that this device may run.

The running agent finds it there, verifies its signatures and goes on as with one on a stick. The copy is whole or not
there at all, also when the power fails.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from agent.config import Config
from agent.errors import AgentError
from agent.protocol.bundle import BLOCK, END, SUFFIX, BundleIndex, padding, write_header
from agent.update.bundle_file import Bundle, BundleError, Extent, open_bundle, opened
from agent.update.bundles import bundle_folder

PIECE = 1 << 20


class BundleImportError(AgentError):
    """A bundle was not imported; nothing was changed."""


def import_bundle(config: Config, path: Path) -> tuple[Path, int]:
    """Copy a bundle, in the place of an earlier one with the same order; returns where it is, and its artifacts.

    Raises:
        BundleImportError: when it is none, is damaged, has nothing for this device, or the disk is full.
    """
    folder = bundle_folder(config.state_dir)
    try:
        bundle = open_bundle(path)
        wanted = _wanted(bundle.index, config.sources.profile)
        extents = {digest: extent for digest, extent in bundle.artifacts.items() if digest in wanted}
        if wanted - extents.keys():
            lacks = len(wanted - extents.keys())
            raise BundleImportError(f"{path} is a copy that lacks {lacks} artifacts: use a whole one")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for left in folder.glob(".*.part"):
            left.unlink()
        target = folder / f"{bundle.index.read_order().name}{SUFFIX}"
        _copy(bundle, extents, target)
    except BundleError as error:
        raise BundleImportError(str(error)) from None
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        remedy = "free some space" if full else "run it as the user that the agent runs as"
        raise BundleImportError(f"{folder} can't be written ({error.strerror}): {remedy}") from None
    return target, len(extents)


def _wanted(index: BundleIndex, profile: str) -> set[str]:
    """Digests of what this device may run; of every profile where it does not know its own."""
    manifests = index.read_manifests()
    mine = [one for one in manifests if not profile or one.profile == profile]
    wanted = {content.digest for one in mine for content in one.contents}
    if not wanted:
        offered = ", ".join(sorted({one.profile for one in manifests}))
        raise BundleImportError(f"the bundle has nothing for profile {profile!r} (bundles.profile); it has {offered}")
    return wanted


def _copy(bundle: Bundle, artifacts: dict[str, Extent], target: Path) -> None:
    first = min((extent.offset for extent in bundle.artifacts.values()), default=None)
    part = target.with_name(f".{target.name}.part")
    try:
        with opened(bundle.path) as (source, found), part.open("wb") as copy:
            head = first - BLOCK if first is not None else found.st_size
            _copy_bytes(source, Extent(0, head), copy.write)
            for digest, extent in artifacts.items():
                copy.write(write_header(f"artifacts/{digest}", extent.size, found.st_mtime))
                seen = hashlib.sha256()
                _copy_bytes(source, extent, copy.write, seen.update)
                if seen.hexdigest() != digest:
                    raise BundleImportError(f"{bundle.path} is damaged: {digest[:12]} has other bytes; copy it anew")
                copy.write(bytes(padding(extent.size)))
            if first is not None:
                copy.write(END)
            copy.flush()
            os.fsync(copy.fileno())
        part.replace(target)
        descriptor = os.open(target.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    finally:
        part.unlink(missing_ok=True)


def _copy_bytes(source: int, extent: Extent, *takers: Callable[[bytes], object]) -> None:
    offset, left = extent.offset, extent.size
    while left:
        piece = os.pread(source, min(PIECE, left), offset)
        if not piece:
            raise BundleError("the bundle became shorter while it was copied")
        for take in takers:
            take(piece)
        offset, left = offset + len(piece), left - len(piece)
