"""Samples on the disk, a file each: whole or not there, bounded, and gone when they are not wanted any more.

A file is written under another name and renamed; it is not synced. A power cut may take the samples of the last
seconds, or leave a file with other bytes than were written, which its checksum finds: a sample is no promise.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from agent.files import SUFFIX, remove_leftovers
from agent.protocol.samples import Sampling
from agent.samples.reservoir import Entry, Reservoir
from agent.samples.sample import Sample, packed, read_sample

log = logging.getLogger("agent")
DAY_S = 86_400.0
KIND = ".sample"


@dataclass(frozen=True)
class Kept:
    """A sample's file, and how sure the model was."""

    path: Path
    confidence: float


class KeptSamples:
    """A folder of samples, by model.

    Args:
        folder: made when the first sample comes.
        most_bytes: of all models together.
        floor_bytes: what they must leave free on the disk.
    """

    def __init__(self, folder: Path, *, most_bytes: int, floor_bytes: int) -> None:
        self._folder = folder
        self._most_bytes, self._floor_bytes = most_bytes, floor_bytes
        self._sampling: dict[str, Sampling] = {}
        self._models: dict[str, Reservoir[Kept]] = {}

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(len(one) for one in self._models.values())

    @property
    def bytes(self) -> int:
        """That they take."""
        return sum(one.bytes for one in self._models.values())

    def open(self, wanted: Mapping[str, Sampling]) -> None:
        """Take up what an earlier run left of what is wanted; the rest goes."""
        self.want(wanted)
        remove_leftovers(self._folder)
        for path in list(self._folder.glob(f"*{KIND}")) if self._folder.is_dir() else ():
            try:
                sample = read_sample(path)
            except (OSError, ValueError) as error:
                log.warning("a sample is removed: %s", error)
                _remove([path])
                continue
            if sample.model in self._models:
                self._admit(sample, path)
            else:
                _remove([path])

    def want(self, wanted: Mapping[str, Sampling]) -> None:
        """From now on keep these; all of other models goes, from the disk too."""
        self._sampling = dict(wanted)
        for model in list(self._models):
            if model not in wanted:
                self._forget(self._models.pop(model))
        for model, sampling in wanted.items():
            known = self._models.setdefault(model, Reservoir(sampling.samples, sampling.bytes))
            _remove(entry.value.path for entry in known.bound(sampling.samples, sampling.bytes))
        if not wanted:
            shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, samples: Iterable[Sample]) -> None:
        """Choose among these and what is there.

        Raises:
            OSError: when one can't be written.
        """
        for sample in samples:
            reservoir = self._models.get(sample.model)
            if reservoir is None or not reservoir.admits(sample.key) or self._is_short(sample.bytes):
                continue
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = self._folder / f"{uuid.uuid4().hex}{KIND}"
            part = path.with_name(f".{path.name}.{os.getpid()}{SUFFIX}")
            try:
                part.touch(mode=0o600)
                part.write_bytes(packed(sample))
                part.replace(path)
            except OSError:
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)
                raise
            self._admit(sample, path)

    def _admit(self, sample: Sample, path: Path) -> None:
        reservoir = self._models[sample.model]
        size = path.stat().st_size
        gone = reservoir.add(sample.key, size, sample.at, Kept(path, sample.confidence))
        _remove(entry.value.path for entry in gone)
        while self.bytes > self._most_bytes and self.drop_lowest():
            pass

    def expire(self, now: float) -> None:
        """Remove those that are too old, or from a time that is not yet, as a clock that was wrong makes them."""
        for model, reservoir in self._models.items():
            longest = self._sampling[model].days * DAY_S
            gone = reservoir.drop(lambda one, longest=longest: abs(now - one.at) > longest)  # type: ignore[misc]
            _remove(entry.value.path for entry in gone)

    def drop_lowest(self) -> bool:
        """Remove the one that would go first; false when there is none."""
        lowest = [(one, reservoir) for reservoir in self._models.values() if (one := reservoir.lowest()) is not None]
        if not lowest:
            return False
        entry, reservoir = min(lowest, key=lambda pair: pair[0].key)
        reservoir.drop(lambda one: one is entry)
        _remove([entry.value.path])
        return True

    def of(self, model: str) -> list[Kept]:
        """What is kept of a model, the least sure first."""
        entries = self._models.get(model, ())
        return sorted((entry.value for entry in entries), key=lambda one: one.confidence)

    def forget(self, names: Iterable[str]) -> None:
        """Remove files by name: they were sent."""
        wanted = set(names)
        for reservoir in self._models.values():
            gone = reservoir.drop(lambda one: one.value.path.name in wanted)
            _remove(entry.value.path for entry in gone)

    def _forget(self, reservoir: Reservoir[Kept]) -> None:
        entries: Iterable[Entry[Kept]] = reservoir
        _remove(entry.value.path for entry in entries)

    def _is_short(self, size: int) -> bool:
        disk = os.statvfs(self._folder if self._folder.is_dir() else self._folder.parent)
        return disk.f_bavail * disk.f_frsize < self._floor_bytes + size


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s can't be removed: %s", path, error)
