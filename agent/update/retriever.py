"""Brings deployments' artifacts: by the best encoding there is, else as they are. It has no thread.

Encodings are hints, and nobody vouches for them. One that fails in any way is noted in the journal and never tried
again for its deployment; the next one is, and at the end the artifact itself is fetched, so that this always ends.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from agent.protocol.delivery import DeliveryPolicy, Waiting
from agent.protocol.delta import DELTA, ZSTD
from agent.protocol.errors import WireErrorCode
from agent.protocol.manifest import Content, Encoding
from agent.update.download import DownloadProgress
from agent.update.fetcher import Fetcher, Owner
from agent.update.sources import Nearness
from agent.update.store import ArtifactStore

log = logging.getLogger("agent.retriever")
DECODINGS = 2  # begun, of one encoding: the first may have ended with the device's power
SILENT_S = 120.0  # with a link and without a byte: the server has the encoding no more
DECODING_S = 60.0  # that decoding may take, and besides
DECODED_PER_S = 250_000  # bytes, on the slowest device


def known_codecs() -> frozenset[str]:
    """What this device can decode: nothing without zstd, which only the decoding process loads."""
    try:
        found = find_spec("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    except ModuleNotFoundError:
        found = None
    if found is None:
        return frozenset()
    return frozenset({ZSTD, DELTA}) if sys.byteorder == "little" else frozenset({ZSTD})


class Connection(Protocol):
    """What retrieving needs of the link."""

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted the connection."""
        ...


class Record(Protocol):
    """A deployment whose artifact is wanted: of a model's version, or of a release of the agent.

    Attributes:
        encodings: ways its artifact may travel, the smallest first.
        failed_encodings: digests of those that were tried and are not tried again.
        decodings: how often decoding the one that is being tried was begun.
        encoding: codec that brought the artifact; empty when it came as it is, or has not come.
        deadline_s: how long a download may go without a new byte.
        delivery: how the artifact may come.
    """

    deployment_id: str
    encodings: tuple[Encoding, ...]
    failed_encodings: tuple[str, ...]
    decodings: int
    encoding: str
    deadline_s: float
    delivery: DeliveryPolicy

    @property
    def manifest(self) -> Content:
        """The artifact."""
        ...

    @property
    def label(self) -> str:
        """What people call it."""
        ...

    @property
    def server_only(self) -> bool:
        """Whether nothing but the server may bring it."""
        ...


RecordT = TypeVar("RecordT", bound=Record)


@dataclass
class _Job(Generic[RecordT]):
    """An encoding on its way to be an artifact."""

    record: RecordT
    encoding: Encoding
    owner: Owner
    missing: int = -1
    silent_since: float = 0.0
    waits: bool = False
    process: subprocess.Popen[bytes] | None = None
    until: float = 0.0


class Retriever(Generic[RecordT]):
    """The artifacts of deployments that are not there yet.

    Args:
        store: where artifacts are.
        fetcher: fetches what travels.
        link: whether there is one.
        save: writes a record to the journal, and collects garbage: of an encoding that failed nothing stays.
        codecs: that this device can decode.
    """

    def __init__(
        self,
        store: ArtifactStore,
        fetcher: Fetcher,
        link: Connection,
        save: Callable[[RecordT], None],
        codecs: frozenset[str] | None = None,
    ) -> None:
        self._store = store
        self._fetcher = fetcher
        self._link = link
        self._save = save
        self._codecs = known_codecs() if codecs is None else codecs
        self._jobs: dict[str, _Job[RecordT]] = {}
        self._now = 0.0  # when it was last told the time

    @property
    def busy(self) -> bool:
        """Whether an encoding comes, or is decoded."""
        return bool(self._jobs)

    def begin(self, record: RecordT, owner: Owner, now: float) -> None:
        """Bring a deployment's artifact; `owner` is told how it went, as the fetcher tells it."""
        self._now = now
        self.cancel(record.deployment_id)
        manifest = record.manifest
        encoding = None if self._store.has(manifest.digest) else self._best(record)
        if encoding is None:
            self._fetch(record, manifest, owner, now)
            return
        log.info("%s comes as %s, %d bytes", record.label, encoding.codec, encoding.size)
        self._jobs[record.deployment_id] = _Job(record, encoding, owner, silent_since=now)
        self._fetch(record, encoding, self, now)

    def _fetch(self, record: RecordT, content: Content, owner: Owner, now: float) -> None:
        self._fetcher.begin(
            record.deployment_id,
            content,
            owner,
            deadline_s=record.deadline_s,
            now=now,
            server_only=record.server_only,
            delivery=record.delivery,
        )

    def cancel(self, key: str) -> None:
        """A deployment wants its artifact no more."""
        self._fetcher.cancel(key)
        job = self._jobs.pop(key, None)
        if job is not None:
            self._end(job)

    def progress(self, key: str) -> DownloadProgress | None:
        """The download of a deployment, of whatever travels; None when there is none."""
        return self._fetcher.progress(key)

    def tick(self, now: float) -> None:
        """See what became of decoders; give up encodings that do not come."""
        self._now = now
        for job in list(self._jobs.values()):
            if job.process is not None:
                self._tick_decoding(job, now)
            else:
                self._tick_download(job, now)

    def stop(self) -> None:
        """End what decodes; it is begun anew at the next start."""
        for job in self._jobs.values():
            self._end(job)
        self._jobs.clear()

    # -- what the fetcher says of encodings

    def received(self, key: str, count: int, source: str) -> None:
        """Bytes of an encoding came."""
        self._jobs[key].owner.received(key, count, source)

    def waits(self, key: str, waiting: Waiting | None) -> None:
        """An encoding stands still on purpose, or goes on."""
        job = self._jobs[key]
        job.waits = waiting is not None
        job.owner.waits(key, waiting)

    def fetched(self, key: str) -> None:
        """An encoding came: decode it."""
        job = self._jobs[key]
        if not self._store.has(job.encoding.digest):
            self._give_up(job, "other bytes came than those of its digest")
        elif job.encoding.base and not self._store.verify(job.encoding.base):
            self._give_up(job, "its base is gone from this device, or was damaged")
        elif job.record.decodings >= DECODINGS:
            self._give_up(job, f"decoding it was begun {DECODINGS} times, and the agent ended each time")
        else:
            job.record.decodings += 1
            self._save(job.record)
            self._decode(job)

    def fetch_failed(self, key: str, code: WireErrorCode, detail: str) -> None:
        """An encoding will not come."""
        self._give_up(self._jobs[key], f"{detail} ({code.value})")

    def _best(self, record: RecordT) -> Encoding | None:
        """Of the encodings that are left; a full one spares too little where peers may have the artifact itself."""
        near = Nearness.FAR if record.server_only else self._fetcher.nearness(record.manifest)
        for one in record.encodings:
            worth = near is Nearness.FAR or (near is Nearness.PERHAPS and one.base)
            fits = worth and one.codec in self._codecs and one.size < record.manifest.size
            if fits and one.digest not in record.failed_encodings and (not one.base or self._store.has(one.base)):
                return one
        return None

    def _tick_download(self, job: _Job[RecordT], now: float) -> None:
        """Time without a link, or of waiting, does not count: it says nothing of the encoding."""
        progress = self._fetcher.progress(job.record.deployment_id)
        missing = 0 if progress is None else progress.part.missing
        if missing != job.missing or job.waits or not self._link.connected:
            job.missing, job.silent_since = missing, now
        elif now - job.silent_since > SILENT_S:
            self._give_up(job, "the server does not send it")

    def _decode(self, job: _Job[RecordT]) -> None:
        encoding, manifest = job.encoding, job.record.manifest
        base = str(self._store.path(encoding.base)) if encoding.base else ""
        command = [sys.executable, "-m", "agent.update.decode", encoding.codec]
        command += [str(self._store.path(encoding.digest)), base, str(self._target(job)), str(manifest.size)]
        try:
            job.process = subprocess.Popen(
                [*command, str(os.getpid())], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
            )
        except OSError as error:
            self._give_up(job, f"no process could be started to decode it: {error.strerror}")

    def _tick_decoding(self, job: _Job[RecordT], now: float) -> None:
        assert job.process is not None
        status = job.process.poll()
        if status is None:
            job.until = job.until or now + DECODING_S + job.record.manifest.size / DECODED_PER_S
            if now > job.until:
                self._give_up(job, "decoding it took too long")
            return
        assert job.process.stdout is not None
        said = job.process.stdout.read(300).decode(errors="replace")
        if status != 0:
            self._give_up(job, said or f"decoding it ended with {status}")
            return
        try:
            good = self._store.adopt(job.record.manifest.digest, self._target(job))
        except OSError as error:
            self._give_up(job, f"the artifact could not be kept: {error.strerror}")
            return
        if not good:
            self._give_up(job, "it makes other bytes than those that were signed")
            return
        self._jobs.pop(job.record.deployment_id)
        self._end(job)
        job.record.encoding = job.encoding.codec
        self._save(job.record)
        job.owner.fetched(job.record.deployment_id)

    def _give_up(self, job: _Job[RecordT], reason: str) -> None:
        """Note that an encoding failed, and go on with what is left."""
        record = job.record
        log.warning("%s of %s can't be used: %s", job.encoding.codec, record.manifest.digest[:12], reason)
        record.failed_encodings = (*record.failed_encodings, job.encoding.digest)
        record.decodings = 0
        self.cancel(record.deployment_id)
        self._save(record)
        self.begin(record, job.owner, self._now)

    def _target(self, job: _Job[RecordT]) -> Path:
        path = self._store.path(job.record.manifest.digest)
        return path.with_name(f"{path.name}.{job.record.deployment_id}")

    def _end(self, job: _Job[RecordT]) -> None:
        if job.process is not None:
            job.process.kill()
            job.process.wait()
            if job.process.stdout is not None:
                job.process.stdout.close()
            job.process = None
        self._store.discard(self._target(job))
