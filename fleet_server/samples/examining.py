"""What a device says is a file of samples, before it is kept: only its outline is read, within bounds. Pure but for it.

The numbers in it are the device's, and nobody reads them here. No array of it can be a pickle when it is read as numpy
does by default.
"""

from __future__ import annotations

import math
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import msgspec

from agent.protocol.limits import LIMITS, MIB
from agent.protocol.samples import LISTING, SampleLine, TensorLine
from agent.protocol.topics import DIGEST

LISTING_BYTES = 4 * MIB
UNPACKED_BYTES = 512 * MIB
ENTRIES = 1 + LIMITS.samples * 8
MEMBER = re.compile(r"(0|[1-9][0-9]{0,3})/(in|out)/(.{1,128})\.npy", re.DOTALL)


class NoSamplesError(Exception):
    """The file is none of samples; the message says why."""


def examine(path: Path, model: str) -> list[dict[str, Any]]:
    """The listing of a file of samples of a model, as JSON.

    Raises:
        NoSamplesError: when it is none, or beyond the bounds.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = _names(archive)
            lines = msgspec.json.decode(archive.read(LISTING), type=list[SampleLine])
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, msgspec.MsgspecError) as error:
        raise NoSamplesError(str(error)[:300] or type(error).__name__) from None
    except (NotImplementedError, RuntimeError, zlib.error, RecursionError, OverflowError) as error:
        raise NoSamplesError(f"{type(error).__name__}: {str(error)[:300]}") from None
    if not 0 < len(lines) <= LIMITS.samples:
        raise NoSamplesError(f"it lists {len(lines)} samples, and 1 to {LIMITS.samples} are taken")
    wanted = {LISTING}
    for number, line in enumerate(lines):
        _check(line, model)
        for side, tensors in (("in", line.inputs), ("out", line.outputs)):
            wanted.update(f"{number}/{side}/{one.name}.npy" for one in tensors)
    if set(names) != wanted or len(names) != len(wanted) or not all(map(MEMBER.fullmatch, wanted - {LISTING})):
        raise NoSamplesError("its members are not those that it lists")
    found: list[dict[str, Any]] = msgspec.to_builtins(lines)
    return found


def _names(archive: zipfile.ZipFile) -> list[str]:
    """Of its members, before any of them is read."""
    entries = archive.infolist()
    if len(entries) > ENTRIES or sum(one.file_size for one in entries) > UNPACKED_BYTES:
        raise NoSamplesError("it has too many members, or unpacks to too many bytes")
    if archive.getinfo(LISTING).file_size > LISTING_BYTES:
        raise NoSamplesError(f"its {LISTING} is too large")
    return [one.filename for one in entries]


def _check(line: SampleLine, model: str) -> None:
    texts = [line.version, *(text for one in (*line.inputs, *line.outputs) for text in (one.name, one.datatype))]
    fits = (
        line.model == model
        and DIGEST.match(line.digest) is not None
        and all(len(text) <= LIMITS.name_chars and "\0" not in text for text in texts)
        and 0 <= line.confidence <= 1
        and 0 <= line.at <= LIMITS.unix_seconds
        and len(line.inputs) <= LIMITS.tensors
        and len(line.outputs) <= LIMITS.tensors
        and all(map(_is_shape, (*line.inputs, *line.outputs)))
    )
    if not fits:
        raise NoSamplesError("a line of its listing is out of bounds, or of another model")


def _is_shape(tensor: TensorLine) -> bool:
    shape = tensor.shape
    return (
        len(shape) <= LIMITS.tensor_rank
        and all(0 <= size < 1 << 31 for size in shape)
        and math.prod(shape) <= LIMITS.tensor_elements
    )
