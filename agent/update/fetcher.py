"""Fetches contents by their digests for whoever wants them: artifacts of deployments, files of trials.

There is one download a digest, however many want it. It has no thread: the supervisor hands it chunks and calls `tick`.
It knows nothing of deployments and trials but their keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

from agent.files import storage_code
from agent.protocol.delivery import DeliveryPolicy, Waiting
from agent.protocol.errors import WireErrorCode
from agent.protocol.manifest import Content
from agent.protocol.messages import Need
from agent.protocol.topics import ParsedChunkTopic
from agent.source_config import SourceKind
from agent.update.download import Allowance, DownloadProgress, Part, write_to
from agent.update.other_sources import OtherSources
from agent.update.pace import Pacer
from agent.update.sources import Nearness
from agent.update.store import ArtifactStore, Bytes
from agent.update.transfer import SourceChunk

UNBOUNDED = DeliveryPolicy()


class Source(Protocol):
    """Whence chunks come: what a fetcher needs of the link."""

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted the connection."""
        ...

    def listen_to_broadcast(self, digest: str) -> None:
        """Receive a content's chunks."""
        ...

    def stop_listening(self, digest: str) -> None:
        """Receive them no more."""
        ...

    def say_need(self, need: Need) -> None:
        """Tell the server what is missing."""
        ...


class Owner(Protocol):
    """Who wants a content."""

    def received(self, key: str, count: int, source: str) -> None:
        """So many bytes came for it from a source, repeats counted."""
        ...

    def waits(self, key: str, waiting: Waiting | None) -> None:
        """It stands still on purpose, or goes on."""
        ...

    def fetched(self, key: str) -> None:
        """All of it came: it is in the store, unless it was damaged and is gone."""
        ...

    def fetch_failed(self, key: str, code: WireErrorCode, detail: str) -> None:
        """It will not come: the store can't be written, or no byte came for as long as was allowed."""
        ...


@dataclass(frozen=True)
class Kept:
    """A chunk was written where it was read: what the fetcher has to be told of it.

    Attributes:
        size: bytes that came.
        part: where it was written; None when nobody wants its content.
        index: which chunk, when it was missing.
        error: why it could not be written.
    """

    size: int
    part: Part | None = None
    index: int | None = None
    error: OSError | None = None


@dataclass
class _Wanted:
    """A content that is being fetched, and for whom.

    Attributes:
        policies: how it may come, by key of who wants it.
        asked: whether the server is to send it.
        listening: whether broadcasts of it are received.
        waiting: what it stands still for.
    """

    progress: DownloadProgress
    owners: dict[str, Owner] = field(default_factory=dict)
    policies: dict[str, DeliveryPolicy] = field(default_factory=dict)
    asked: bool = False
    listening: bool = False
    waiting: Waiting | None = None


class Fetcher:
    """The downloads of this device.

    Args:
        store: where contents go.
        source: whence chunks come.
        place: the store's folder as people are told of it.
        others: sources but the link; none when absent.
        pacer: counts what comes, and says how it may go on; nothing is bounded when absent.
    """

    def __init__(
        self,
        store: ArtifactStore,
        source: Source,
        place: str,
        *,
        others: OtherSources | None = None,
        pacer: Pacer | None = None,
    ) -> None:
        self._store = store
        self._source = source
        self._place = place
        self._others = others
        self._pacer = pacer or Pacer()
        self._wanted: dict[str, _Wanted] = {}

    @property
    def busy(self) -> bool:
        """Whether something comes, or might: what waits for its time, or for another link, does not."""
        return any(wanted.waiting is None for wanted in self._wanted.values())

    def begin(
        self,
        key: str,
        content: Content,
        owner: Owner,
        *,
        deadline_s: float,
        now: float,
        server_only: bool = False,
        delivery: DeliveryPolicy = UNBOUNDED,
    ) -> None:
        """Fetch a content, from where an earlier download of it ended; `owner` is told how it went.

        Called again, it takes the new policy. With `server_only` it comes by the link alone: what came before from
        several sources was wrong.
        """
        if server_only and self._others is not None:
            self._others.bar(content.digest, now)
        if self._store.has(content.digest):
            owner.fetched(key)
            return
        wanted = self._wanted.get(content.digest)
        if wanted is not None:
            wanted.owners[key], wanted.policies[key] = owner, delivery
            owner.waits(key, wanted.waiting)
            return
        try:
            lacking = self._store.make_room(content, self._reserved())
            if lacking:
                owner.fetch_failed(key, WireErrorCode.DISK_FULL, self._short(content, lacking))
                return
            part = self._store.open_part(content)
        except OSError as error:
            owner.fetch_failed(key, *self.told(error))
            return
        wanted = _Wanted(DownloadProgress(key, part, deadline_s, now), {key: owner}, {key: delivery})
        self._wanted[content.digest] = wanted
        if part.missing == 0:
            self._finish(wanted, now)
        else:
            self._allowed(wanted, now)  # so that it listens before it asks

    def cancel(self, key: str) -> None:
        """One who wanted a content wants it no more."""
        for wanted in list(self._wanted.values()):
            if wanted.owners.pop(key, None) is not None and not wanted.owners:
                self._end(wanted)

    def keep(self, topic: ParsedChunkTopic, payload: Bytes) -> Kept | None:
        """Write a chunk that came by the link; None for an exclusive-or of several, which only `chunk` takes.

        Called from the thread that reads the link: another would read the chunk from another processor's cache, which
        costs more than all that is done with it. What comes of it goes to `kept`, in the fetcher's own thread.
        """
        if topic.others:
            return None
        return self._write(topic.digest, (topic.chunk,), payload)

    def kept(self, kept: Kept, now: float) -> None:
        """A chunk that came by the link was written, or could not be."""
        self._pacer.received(kept.size, now)  # also what is not wanted any more, and came all the same
        self._settle(kept, SourceKind.MQTT.value, now)

    def chunk(self, topic: ParsedChunkTopic, payload: Bytes, now: float) -> None:
        """Take a chunk that came by the link, or an exclusive-or of several."""
        self.kept(self._write(topic.digest, (topic.chunk, *topic.others), payload), now)

    def source_chunk(self, chunk: SourceChunk, now: float) -> None:
        """Take a chunk that came from another source."""
        whose = self._others.took(chunk, now) if self._others is not None else None
        if whose is None:
            return
        if not whose[1].startswith(SourceKind.USB.value):
            self._pacer.received(len(chunk.payload), now)
        self._settle(self._write(whose[0], (chunk.index,), chunk.payload), whose[1], now)

    def tick(self, now: float) -> None:
        """Say what is missing and sync what came, where it is time to; give up what has stalled."""
        for wanted in list(self._wanted.values()):
            try:
                wanted.progress.sync(now)
            except OSError as error:
                self._not_written(wanted, error)
                continue
            allowed = self._allowed(wanted, now)
            if allowed is not None and wanted.progress.overdue(now):
                self._fail(wanted, WireErrorCode.DOWNLOAD_STALLED, "no new byte came for as long as is allowed")
            elif self._others_bring(wanted, allowed, now):
                if wanted.asked and self._source.connected:
                    wanted.asked = False
                    self._source.say_need(wanted.progress.no_more(now))
            elif allowed is None or not self._source.connected:
                continue
            elif (need := wanted.progress.need(now, allowed)) is not None:
                wanted.asked = True
                self._source.say_need(need)

    def link_up(self, now: float) -> None:
        """Ask at once for what is missing."""
        for wanted in self._wanted.values():
            wanted.progress.link_up(now)

    def nearness(self, content: Content) -> Nearness:
        """Whether a content may be had without the server's link."""
        return Nearness.FAR if self._others is None else self._others.nearness(content.digest)

    def progress(self, key: str) -> DownloadProgress | None:
        """The download of one who wants a content; None when there is none."""
        return next((one.progress for one in self._wanted.values() if key in one.owners), None)

    def stop(self) -> None:
        """Let the files go; what came stays and counts at the next start."""
        for wanted in list(self._wanted.values()):
            self._end(wanted)

    def _write(self, digest: str, chunks: tuple[int, ...], payload: Bytes) -> Kept:
        """Write a chunk, or of an exclusive-or of several the missing one, if its content is being fetched."""
        wanted, size = self._wanted.get(digest), len(payload)
        if wanted is None:
            return Kept(size)
        part = wanted.progress.part
        try:
            return Kept(size, part, write_to(part, chunks, payload))
        except OSError as error:
            return Kept(size, part, error=error)

    def _settle(self, kept: Kept, source: str, now: float) -> None:
        """Reckon with a chunk that was written, or could not be; with none of a download that was ended meanwhile."""
        wanted = self._wanted.get(kept.part.content.digest) if kept.part is not None else None
        if wanted is None or wanted.progress.part is not kept.part:
            return
        for key, owner in wanted.owners.items():
            owner.received(key, kept.size, source)
        if kept.error is not None:
            self._not_written(wanted, kept.error)
            return
        if kept.index is None:
            return
        complete = wanted.progress.written(kept.index, now)
        if self._others is not None and source != SourceKind.MQTT:
            self._others.brought(wanted.progress.part.content.digest, source)
        if complete:
            self._finish(wanted, now)

    def _not_written(self, wanted: _Wanted, error: OSError) -> None:
        """Where something could go, what is missing is asked for again."""
        code, detail = self.told(error)
        if code is not WireErrorCode.DISK_FULL or not self._store.drop_spare():
            self._fail(wanted, code, detail)

    def _allowed(self, wanted: _Wanted, now: float) -> Allowance | None:
        """How a download may go on; None while it has to wait. Where several want it, one that may is enough."""
        chunk_size = wanted.progress.part.content.chunk_size
        answers = [self._pacer.download(wanted.policies.get(key, UNBOUNDED), chunk_size, now) for key in wanted.owners]
        allowed = next((one for one in answers if isinstance(one, Allowance)), None)
        waiting = next((one for one in answers if isinstance(one, Waiting)), None) if allowed is None else None
        self._listen(wanted, on=allowed is not None and not allowed.alone)
        if waiting is not None:
            if wanted.waiting is None and self._source.connected:
                self._source.say_need(wanted.progress.no_more(now))
            wanted.progress.waited(now)
        if waiting != wanted.waiting:
            wanted.waiting = waiting
            for key, owner in wanted.owners.items():
                owner.waits(key, waiting)
        return allowed

    def _others_bring(self, wanted: _Wanted, allowed: Allowance | None, now: float) -> bool:
        """Whether another source than the link brings a content; a stick may even where no more bytes may come."""
        flows = allowed is not None and allowed.window > 0
        if self._others is None:
            return False
        return self._others.brings(wanted.progress, now, lambda kind: flows or kind is SourceKind.USB)

    def _listen(self, wanted: _Wanted, *, on: bool) -> None:
        digest = wanted.progress.part.content.digest
        if on and not wanted.listening:
            self._source.listen_to_broadcast(digest)
        elif wanted.listening and not on:
            self._source.stop_listening(digest)
        wanted.listening = on

    def _finish(self, wanted: _Wanted, now: float) -> None:
        try:
            good = wanted.progress.part.finish()
        except OSError as error:
            self._fail(wanted, *self.told(error))
            return
        if self._others is not None:
            self._others.finished(wanted.progress.part.content.digest, now, good=good)
        self._end(wanted)
        for key, owner in wanted.owners.items():
            owner.fetched(key)

    def _fail(self, wanted: _Wanted, code: WireErrorCode, detail: str) -> None:
        self._end(wanted)
        for key, owner in wanted.owners.items():
            owner.fetch_failed(key, code, detail)

    def _end(self, wanted: _Wanted) -> None:
        digest = wanted.progress.part.content.digest
        if self._wanted.pop(digest, None) is not None:
            wanted.progress.part.close()
            self._listen(wanted, on=False)
            if self._others is not None:
                self._others.forget(digest)

    def _reserved(self) -> int:
        """Bytes that the downloads that go on still need, at most."""
        parts = [wanted.progress.part for wanted in self._wanted.values()]
        return sum(part.missing * part.content.chunk_size for part in parts)

    def _short(self, content: Content, lacking: int) -> str:
        return (
            f"{self._place} lacks {_mib(lacking)} MiB for the {_mib(content.size)} MiB that are to come: free that, or "
            "lower disk_floor_mb; nothing that is kept there can be spared"
        )

    def told(self, error: OSError) -> tuple[WireErrorCode, str]:
        """What an error of the store is called on the wire, and what would mend it."""
        detail = f"{self._place} can't be written: {error.strerror}; free some space or mend the disk"
        return storage_code(error), detail


def _mib(count: int) -> int:
    return math.ceil(count / 2**20)
