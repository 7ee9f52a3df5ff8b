"""What was converted before: a folder with a file for each conversion, named by a hash of all that decides its result.

A hit gives the converted bytes and what was found out of their answers. Latency and memory belong to the machine and
the moment, so they are measured again. Whoever starts the conversion fills the folder and keeps what is new in it;
nothing here knows where that is kept. A damaged file is a miss.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import IO

import msgspec

from agent.processing import rows
from converters.digest import file_digest
from converters.job import BuildJob, Measurements, PassRecord
from converters.step import Recipe, tool_versions

SUFFIX = ".kept"
DIGEST_BYTES = 32
LENGTH_BYTES = 8
PIECE = 1 << 20
# Steps whose result does not hang on the accuracy that the target may lose; any other step's is taken to.
BUDGET_FREE = frozenset(
    {
        "keep",
        "onnx-dynamic-int8",
        "onnx-equalize",
        "onnx-fp16",
        "onnx-fuse-attention",
        "onnx-keep-sums",
        "onnx-prepare",
        "onnx-static-int8",
        "onnx-weight-only",
        "litert-quantize",
        "litert-signature",
        "litert-widen",
    }
)
# Answers are the same on every run only where the processor gives them.
EXACT_PROVIDERS = frozenset({"cpu", "xnnpack"})


class Kept(msgspec.Struct, frozen=True):
    """An earlier conversion: its passes, and what was measured of it then."""

    passes: tuple[PassRecord, ...]
    measurements: Measurements


class CandidateCache:
    """The folder of one build.

    Args:
        job: with `cache`, the folder and the kind of machine.
    """

    def __init__(self, job: BuildJob) -> None:
        self._spec = job.cache
        self._job = job

    def key(self, recipe: Recipe, start: Path) -> str:
        """A hash of what decides a recipe's result: its start, parameters, tools and data, and the kind of machine."""
        if self._spec is None:
            return ""
        target = self._job.target
        free = all(step.name in BUDGET_FREE for step in recipe.steps)
        decisive = {
            "start": file_digest(start),
            "recipe": [recipe.name, *([step.name, sorted(step.parameters.items())] for step in recipe.steps)],
            "tools": sorted(tool_versions(recipe.tools).items()),
            "code": code_digest(),
            "data": data_digests(self._job),
            "runtime": [target.runtime, *target.providers, target.provider_options],
            "accuracy_drop_points": None if free else [target.accuracy_drop_points],
            "machine": self._spec.machine,
        }
        return hashlib.sha256(msgspec.json.encode(decisive, order="sorted")).hexdigest()

    def load(self, key: str, target: Path) -> Kept | None:
        """Write what was kept to a file; None when there is nothing, or it is damaged."""
        if self._spec is None:
            return None
        path = Path(self._spec.path) / f"{key}{SUFFIX}"
        kept = unpack(path, target) if path.exists() else None
        if kept is None:
            path.unlink(missing_ok=True)
        return kept

    def save(self, key: str, made: Path, passes: tuple[PassRecord, ...], measured: Measurements) -> None:
        """Keep a conversion, where there is room for it."""
        if self._spec is None:
            return
        path = Path(self._spec.path) / f"{key}{SUFFIX}"
        part = path.with_suffix(".part")
        try:
            pack(Kept(passes, measured), made, part)
            part.replace(path)
        except OSError:
            part.unlink(missing_ok=True)

    @property
    def reuses_answers(self) -> bool:
        """Whether accuracy of an earlier run holds for the next one."""
        return set(self._job.target.providers) <= EXACT_PROVIDERS


def pack(kept: Kept, made: Path, packed: Path) -> None:
    """Write one file: length of the record, the record, the converted bytes, SHA-256 of all that."""
    record = msgspec.json.encode(kept)
    seen = hashlib.sha256()
    with made.open("rb") as source, packed.open("wb") as target:
        for piece in chain((len(record).to_bytes(LENGTH_BYTES, "big"), record), _pieces(source)):
            seen.update(piece)
            target.write(piece)
        target.write(seen.digest())


def unpack(packed: Path, target: Path) -> Kept | None:
    """Write the converted bytes of a packed file; None, and nothing written, when it is damaged."""
    size = packed.stat().st_size - DIGEST_BYTES
    seen = hashlib.sha256()
    with packed.open("rb") as source:
        for piece in _pieces(source, max(size, 0)):
            seen.update(piece)
        if seen.digest() != source.read():
            return None
        source.seek(0)
        length = int.from_bytes(source.read(LENGTH_BYTES), "big")
        if length > size - LENGTH_BYTES:
            return None
        try:
            kept = msgspec.json.decode(source.read(length), type=Kept)
        except msgspec.MsgspecError:
            return None  # whole, but of another version
        with target.open("wb") as made:
            made.writelines(_pieces(source, size - LENGTH_BYTES - length))
    return kept


def _pieces(source: IO[bytes], length: int | None = None) -> Iterator[bytes]:
    """What is left of a file, or so many bytes of it."""
    left = sys.maxsize if length is None else length
    while left and (piece := source.read(min(PIECE, left))):
        left -= len(piece)
        yield piece


def data_digests(job: BuildJob) -> list[list[str]]:
    """Name and digest of every data set of a job, in the order of their names, and of how its images become inputs."""
    found = []
    for name in sorted(job.__struct_fields__):
        digest = getattr(getattr(job, name), "digest", None)
        if isinstance(digest, str):
            found.append([name, digest])
    if job.processing is not None:
        found.append(["processing", hashlib.sha256(msgspec.json.encode(job.processing.image)).hexdigest()])
    return found


def work_digest(job: BuildJob) -> str:
    """A hash of the files a job works on: what was kept of one is of use to another only where these are the same."""
    sources = sorted([one.format.value, one.digest] for one in job.sources)
    return hashlib.sha256(msgspec.json.encode([sources, data_digests(job), job.target.runtime])).hexdigest()


@cache
def code_digest() -> str:
    """SHA-256 of this package's source and that of processing: another version of Shoal may convert otherwise."""
    found = hashlib.sha256()
    for folder in (Path(__file__).parent, Path(rows.__file__).parent):
        for path in sorted(folder.rglob("*.py"), key=os.fspath):
            found.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()
