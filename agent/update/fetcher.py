"""Fetches contents by their digests for whoever wants them: artifacts of deployments, files of trials.

There is one download a digest, however many want it. It has no thread: the supervisor hands it chunks and calls `tick`.
It knows nothing of deployments and trials but their keys.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import Protocol

from agent.protocol.delivery import DeliveryPolicy, Waiting
from agent.protocol.errors import WireErrorCode
from agent.protocol.manifest import Content
from agent.protocol.messages import Need
from agent.protocol.topics import ParsedChunkTopic
from agent.update.download import Allowance, DownloadProgress
from agent.update.pace import Pacer
from agent.update.store import ArtifactStore

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

    def received(self, key: str, count: int) -> None:
        """So many bytes came over the wire for it, repeats counted."""
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


@dataclass
class _Wanted:
    """A content that is being fetched, and for whom.

    Attributes:
        policies: how it may come, by key of who wants it.
        listening: whether broadcasts of it are received.
        waiting: what it stands still for.
    """

    progress: DownloadProgress
    owners: dict[str, Owner] = field(default_factory=dict)
    policies: dict[str, DeliveryPolicy] = field(default_factory=dict)
    listening: bool = False
    waiting: Waiting | None = None


class Fetcher:
    """The downloads of this device.

    Args:
        store: where contents go.
        source: whence chunks come.
        place: the store's folder as people are told of it.
        pacer: counts what comes, and says how it may go on; nothing is bounded when absent.
    """

    def __init__(self, store: ArtifactStore, source: Source, place: str, pacer: Pacer | None = None) -> None:
        self._store = store
        self._source = source
        self._place = place
        self._pacer = pacer or Pacer()
        self._wanted: dict[str, _Wanted] = {}

    def begin(
        self,
        key: str,
        content: Content,
        owner: Owner,
        *,
        deadline_s: float,
        now: float,
        delivery: DeliveryPolicy = UNBOUNDED,
    ) -> None:
        """Fetch a content, from where an earlier download of it ended; `owner` is told how it went.

        Called again, it takes the new policy.
        """
        if self._store.has(content.digest):
            owner.fetched(key)
            return
        wanted = self._wanted.get(content.digest)
        if wanted is not None:
            wanted.owners[key], wanted.policies[key] = owner, delivery
            owner.waits(key, wanted.waiting)
            return
        try:
            part = self._store.open_part(content)
        except OSError as error:
            owner.fetch_failed(key, *self.told(error))
            return
        wanted = _Wanted(DownloadProgress(key, part, deadline_s, now), {key: owner}, {key: delivery})
        self._wanted[content.digest] = wanted
        if part.missing == 0:
            self._finish(wanted)
        else:
            self._allowed(wanted, now)  # so that it listens before it asks

    def cancel(self, key: str) -> None:
        """One who wanted a content wants it no more."""
        for wanted in list(self._wanted.values()):
            if wanted.owners.pop(key, None) is not None and not wanted.owners:
                self._end(wanted)

    def chunk(self, topic: ParsedChunkTopic, payload: bytes, now: float) -> None:
        """Take a chunk, if it is of a content that is being fetched."""
        self._pacer.received(len(payload), now)  # also what is not wanted any more, and came all the same
        wanted = self._wanted.get(topic.digest)
        if wanted is None:
            return
        for key, owner in wanted.owners.items():
            owner.received(key, len(payload))
        try:
            if topic.others:
                complete = wanted.progress.combined((topic.chunk, *topic.others), payload, now)
            else:
                complete = wanted.progress.chunk(topic.chunk, payload, now)
        except OSError as error:
            self._fail(wanted, *self.told(error))
            return
        if complete:
            self._finish(wanted)

    def tick(self, now: float) -> None:
        """Say what is missing, where it is time to; give up what has stalled."""
        for wanted in list(self._wanted.values()):
            allowed = self._allowed(wanted, now)
            if allowed is None:
                continue
            if wanted.progress.overdue(now):
                self._fail(wanted, WireErrorCode.DOWNLOAD_STALLED, "no new byte came for as long as is allowed")
            elif self._source.connected and (need := wanted.progress.need(now, allowed)) is not None:
                self._source.say_need(need)

    def link_up(self, now: float) -> None:
        """Ask at once for what is missing."""
        for wanted in self._wanted.values():
            wanted.progress.link_up(now)

    def progress(self, key: str) -> DownloadProgress | None:
        """The download of one who wants a content; None when there is none."""
        return next((one.progress for one in self._wanted.values() if key in one.owners), None)

    def stop(self) -> None:
        """Let the files go; what came stays and counts at the next start."""
        for wanted in list(self._wanted.values()):
            self._end(wanted)

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

    def _listen(self, wanted: _Wanted, *, on: bool) -> None:
        digest = wanted.progress.part.content.digest
        if on and not wanted.listening:
            self._source.listen_to_broadcast(digest)
        elif wanted.listening and not on:
            self._source.stop_listening(digest)
        wanted.listening = on

    def _finish(self, wanted: _Wanted) -> None:
        try:
            wanted.progress.part.finish()
        except OSError as error:
            self._fail(wanted, *self.told(error))
            return
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

    def told(self, error: OSError) -> tuple[WireErrorCode, str]:
        """What an error of the store is called on the wire, and what would mend it."""
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        code = WireErrorCode.DISK_FULL if full else WireErrorCode.STORE_ERROR
        return code, f"{self._place} can't be written: {error.strerror}; free some space or mend the disk"
