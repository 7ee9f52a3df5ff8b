"""The file in which samples go to the server: an `.npz` that also holds `samples.json`. Written without numpy.

`{n}/in/{input}` and `{n}/out/{output}` are the tensors of the n-th sample, and `samples.json` says of each its time,
confidence, version and digest, and its tensors' datatypes and shapes. Texts are a row of bytes, each behind its length;
nothing in it is a pickle.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from agent.files import rename_durably
from agent.protocol.datatypes import ARRAY_TYPES
from agent.protocol.samples import LISTING, SampleLine, TensorLine
from agent.samples.keeping import Kept
from agent.samples.sample import SampleTensor, read_sample

OVERHEAD = 1024  # bytes of the file that a sample, and each of its tensors, may take beside its numbers


class Packed(msgspec.Struct, frozen=True):
    """A file that is ready to be sent: digest, bytes, and the samples in it by the names of their own files."""

    digest: str
    size: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Bounds:
    """How many samples, and how many bytes, a file may have."""

    samples: int
    bytes: int


def pack(kept: Sequence[Kept], path: Path, bounds: Bounds) -> Packed | None:
    """Write samples into one file, as many as it takes; None when there is none that can be read.

    Raises:
        OSError: when it can't be written; nothing is there then.
    """
    part = path.with_suffix(".part")
    lines: list[SampleLine] = []
    names: list[str] = []
    total = 0
    try:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
            for one in kept[: bounds.samples]:
                try:
                    sample = read_sample(one.path)
                except (OSError, ValueError):
                    continue  # it was removed meanwhile
                size = sample.bytes + OVERHEAD * (1 + len(sample.inputs) + len(sample.outputs))
                if total + size > bounds.bytes:
                    continue
                total += size
                for side, tensors in (("in", sample.inputs), ("out", sample.outputs)):
                    for tensor in tensors:
                        archive.writestr(f"{len(lines)}/{side}/{tensor.name}.npy", npy(tensor))
                lines.append(
                    SampleLine(
                        sample.model, sample.version, sample.digest, sample.at, sample.confidence,
                        _lines(sample.inputs), _lines(sample.outputs),
                    )
                )  # fmt: skip
                names.append(one.path.name)
            archive.writestr(LISTING, msgspec.json.encode(lines))
        if not lines:
            part.unlink()
            return None
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        rename_durably(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    return Packed(digest, path.stat().st_size, tuple(names))


def npy(tensor: SampleTensor) -> bytes:
    """A tensor as a file of numpy's, version 1.0; of BYTES its bytes as they are."""
    descr = ARRAY_TYPES.get(tensor.datatype, "|u1")
    shape = tensor.shape if tensor.datatype in ARRAY_TYPES else (len(tensor.data),)
    sizes = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': ({sizes}), }}"
    header += " " * (-(10 + len(header) + 1) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode("latin-1") + tensor.data


def _lines(tensors: Sequence[SampleTensor]) -> tuple[TensorLine, ...]:
    return tuple(TensorLine(one.name, one.datatype, one.shape) for one in tensors)
