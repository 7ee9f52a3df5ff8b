"""What a simulated device ought to run, and how far it has come. Pure.

The agent's updater decides, the agent's probation judges; what they want done is done here without files and processes.
A manifest is taken for signed, and what was fetched for right: a simulator has no key to check by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from agent.protocol.errors import WireErrorCode
from agent.protocol.lifecycle import ENDED, Phase
from agent.protocol.manifest import Content
from agent.protocol.messages import DeploymentReport, DesiredState
from agent.protocol.topics import DeviceTopic, ParsedChunkTopic
from agent.update.download import DownloadProgress
from agent.update.effects import (
    ActivateArtifact,
    BeginProbation,
    CheckTrust,
    Download,
    Effect,
    LoadArtifact,
    StopDownload,
    UnloadArtifact,
    Verify,
)
from agent.update.probation import Probation, fall_back
from agent.update.updater import Record, Updater
from fleet_server.simulator.agenda import Agenda
from fleet_server.simulator.behaviours import Conduct, Fetch
from fleet_server.simulator.chances import drawn
from fleet_server.simulator.chunks import Chunks
from fleet_server.simulator.inference import Inference
from fleet_server.simulator.outputs import Listen, Output, Say

PRETENDED = "simulated"
"""The source that artifacts are said to come from when no byte travels."""
HELD = 6
LOOK_S = 1.0
FETCH_TICK_S = 0.2
WORKER_RESTART_S = 0.5
UNSETTLED = frozenset({Phase.LOADING, Phase.PROBATION, Phase.EXPOSED})


@dataclass
class _Fetch:
    """A content on its way by MQTT, and for which deployments."""

    progress: DownloadProgress
    wanted_by: set[str] = field(default_factory=set)


class Deployments:
    """The deployments of one device since it started; what it had before is given.

    Args:
        records: as an earlier start left them.
        revision: of the desired state last accepted.
        held: digests of contents that it has.
        conduct: of the device.
        inference: its worker.
        agenda: where what takes time is put.
        put: takes what is to be done.
        connected: whether it has a connection.
        note: takes a level and a sentence for the device's log.
        activations: counts how often each `model@version` was let serve.
    """

    def __init__(
        self,
        records: dict[str, Record],
        revision: int,
        held: dict[str, None],
        conduct: Conduct,
        inference: Inference,
        agenda: Agenda,
        put: Callable[[Output], None],
        connected: Callable[[], bool],
        note: Callable[[str, str], None],
        activations: Counter[str],
    ) -> None:
        self._updater = Updater(records, revision)
        self._probation = Probation()
        self._watched: set[str] = set()
        self._held = held
        self._conduct = conduct
        self._inference = inference
        self._agenda = agenda
        self._put = put
        self._connected = connected
        self._note = note
        self._activations = activations
        self._fetches: dict[str, _Fetch] = {}
        self._worker = 0  # how often it was started
        self._ticking = False
        self.changed = False
        self.now = 0.0

    @property
    def records(self) -> dict[str, Record]:
        """By deployment id."""
        return self._updater.records

    @property
    def revision(self) -> int:
        """Of the desired state last accepted."""
        return self._updater.revision

    @property
    def held(self) -> dict[str, None]:
        """Digests of what it has, the newest last."""
        return self._held

    def recover(self) -> None:
        """The device has started; its worker is ready soon."""
        self._carry_out(self._updater.recover())
        self._agenda.at(self.now + WORKER_RESTART_S, self._worker_ready, self._worker)

    def desired(self, state: DesiredState) -> bool:
        """Accept a desired state; false when it is not newer than what is known."""
        fresh = state.revision > self._updater.revision
        self._carry_out(self._updater.desired(state))
        return fresh

    def link_up(self) -> None:
        """There is a connection: ask for what is missing."""
        for digest, fetch in self._fetches.items():
            fetch.progress.link_up(self.now)
            self._put(Listen(digest, on=True))

    def chunk(self, topic: ParsedChunkTopic, payload: bytes) -> None:
        """Take a chunk, or an exclusive-or of several."""
        fetch = self._fetches.get(topic.digest)
        if fetch is None:
            return
        for key in fetch.wanted_by:
            record = self.records[key]
            record.count("mqtt", len(payload))
            record.received_bytes += len(payload)
        if fetch.progress.take((topic.chunk, *topic.others), payload, self.now):
            self._fetched(topic.digest)

    def reports(self) -> tuple[DeploymentReport, ...]:
        """All of them, as the server is told."""
        return tuple(self._report(one) for one in self.records.values())

    def _report(self, record: Record) -> DeploymentReport:
        fetch = self._fetches.get(record.manifest.digest)
        failed = record.phase in ENDED and record.phase is not Phase.SUPERSEDED
        return DeploymentReport(
            deployment_id=record.deployment_id,
            model=record.manifest.model,
            version=record.manifest.version,
            digest=record.manifest.digest,
            phase=record.phase,
            received_bytes=record.received_bytes,
            missing_chunks=fetch.progress.part.missing if fetch else 0,
            failure=record.failure if failed else None,
            attempts=record.attempts,
            probation=self._probation.report(record.deployment_id) or record.probation,
            sources=record.sources,
        )

    # -- carrying out

    def _carry_out(self, effects: list[Effect]) -> None:
        waiting = list(effects)
        while waiting:
            waiting += self._carry_out_one(waiting.pop(0))
        if self._updater.changed:
            for key in sorted(self._updater.changed):
                self._tell(key)
            self._updater.changed.clear()
            self.changed = True
            for key in self._updater.forgettable():
                del self.records[key]

    def _tell(self, key: str) -> None:
        record = self.records.get(key)
        if record is not None:
            what = f"{record.manifest.model}@{record.manifest.version}: {record.phase.value}"
            if record.failure is not None and record.phase in ENDED:
                self._note("WARNING", f"{what}: {record.failure.detail}")
            else:
                self._note("INFO", what)

    def _carry_out_one(self, effect: Effect) -> list[Effect]:
        """Do what is wanted; returns what follows at once."""
        if isinstance(effect, UnloadArtifact):
            self._inference.unload(effect.model, effect.digest, self.now)
            self.changed = True
            return []
        key = effect.deployment_id
        record = self.records.get(key)
        if record is None:
            return []
        match effect:
            case CheckTrust():
                return self._updater.trusted(key)
            case Download():
                return self._download(record)
            case StopDownload():
                self._stop(key)
            case Verify():
                self._hold(record)
                return self._updater.verified(key, good=True)
            case LoadArtifact():
                self._agenda.at(self.now + drawn(self._conduct.load_s), self._loaded, key, self._worker)
            case ActivateArtifact():
                self._activations[f"{record.manifest.model}@{record.manifest.version}"] += 1
                self._inference.activate(key, self.now)
                self.changed = True
            case BeginProbation():
                self._watch(record, effect.before_id)
        return []

    # -- what is fetched

    def _download(self, record: Record) -> list[Effect]:
        lacking = self._lacking(record)
        if not lacking:
            return self._updater.downloaded(record.deployment_id)
        if self._conduct.link.fetch is Fetch.PRETEND:
            seconds = sum(one.size for one in lacking) / drawn(self._conduct.link.bytes_s)
            self._agenda.at(self.now + seconds, self._came, record.deployment_id)
            return []
        content = lacking[-1]  # golden inputs first: they are small
        fetch = self._fetches.get(content.digest)
        if fetch is None:
            progress = DownloadProgress(record.deployment_id, Chunks(content), record.deadline_s, self.now)
            fetch = self._fetches[content.digest] = _Fetch(progress)
            self._put(Listen(content.digest, on=True))
        fetch.wanted_by.add(record.deployment_id)
        self._tick_later()
        return []

    def _lacking(self, record: Record) -> list[Content]:
        return [one for one in record.manifest.contents if one.digest not in self._held]

    def _came(self, key: str) -> None:
        """All of it came, from nowhere."""
        record = self.records.get(key)
        if record is not None and record.phase is Phase.DOWNLOADING:
            record.count(PRETENDED, sum(one.size for one in self._lacking(record)))
            self._carry_out(self._updater.downloaded(key))

    def _fetched(self, digest: str) -> None:
        fetch = self._fetches.pop(digest)
        self._put(Listen(digest, on=False))
        self._held[digest] = None
        for key in fetch.wanted_by:
            self._carry_out(self._download(self.records[key]))

    def _tick_later(self) -> None:
        if not self._ticking and self._fetches:
            self._ticking = True
            self._agenda.at(self.now + FETCH_TICK_S, self._tick)

    def _tick(self) -> None:
        """Say what is missing, where it is time to; give up what has stalled."""
        self._ticking = False
        for fetch in list(self._fetches.values()):
            need = fetch.progress.need(self.now) if self._connected() else None
            if need is not None:
                self._put(Say(DeviceTopic.NEED, need))
            if fetch.progress.overdue(self.now):
                detail = "no new byte came for as long as the deployment allows"
                for key in list(fetch.wanted_by):
                    self._carry_out(self._updater.failed(key, WireErrorCode.DOWNLOAD_STALLED, detail))
        self._tick_later()

    def _stop(self, key: str) -> None:
        """Fetch nothing more of a deployment, and watch it no more."""
        self._probation.end(key)
        self._watched.discard(key)
        for digest, fetch in list(self._fetches.items()):
            fetch.wanted_by.discard(key)
            if not fetch.wanted_by:
                del self._fetches[digest]
                self._put(Listen(digest, on=False))

    def _hold(self, record: Record) -> None:
        """Keep what is verified; the oldest go that nothing runs."""
        for content in record.manifest.contents:
            self._held.pop(content.digest, None)
            self._held[content.digest] = None
        kept = self._updater.kept_digests()
        spare = [digest for digest in self._held if digest not in kept]
        for digest in spare[: max(len(self._held) - HELD, 0)]:
            del self._held[digest]

    # -- the worker

    def _worker_ready(self, worker: int) -> None:
        if worker == self._worker:
            self._carry_out(self._updater.worker_ready())

    def _loaded(self, key: str, worker: int) -> None:
        """The worker has loaded it, or could not."""
        record = self.records.get(key)
        if record is None or worker != self._worker:
            return
        if record.phase is Phase.LOADING and self._inference.fate(record.manifest).fails:
            detail = "it can't be loaded: the simulation's behaviours say so (install_fails)"
            self._carry_out(self._updater.failed(key, WireErrorCode.LOAD_FAILED, detail))
            return
        self._inference.load(record.manifest, key)
        self._carry_out(self._updater.loaded(key))

    def restart_worker(self) -> bool:
        """Replace the process, as somebody asked: what answers is loaded anew. False while a version is watched."""
        if any(one.phase in UNSETTLED for one in self.records.values()):
            return False
        self._updater.worker_leaves()
        self._inference.ended(self.now)
        self._begin_worker()
        return True

    def _worker_died(self) -> None:
        seen = self._probation.clear()
        self._watched.clear()
        self._inference.ended(self.now)
        self._carry_out(self._updater.worker_crashed(seen))
        self._begin_worker()

    def _begin_worker(self) -> None:
        self._worker += 1
        self.changed = True
        self._agenda.at(self.now + WORKER_RESTART_S, self._worker_ready, self._worker)

    def _watch(self, record: Record, before_id: str | None) -> None:
        provider = self._inference.provider(record.manifest)
        self._probation.begin(
            record.deployment_id,
            record.watching,
            self.now,
            before_id=before_id,
            before_mb=self._inference.memory_mb - record.manifest.size / 2**20,
            provider=provider,
            note=fall_back(provider, self._inference.fell_back(record.manifest)),
        )
        if not self._watched:
            self._agenda.at(self.now + LOOK_S, self._look, self._worker)
        self._watched.add(record.deployment_id)

    def _look(self, worker: int) -> None:
        """See how the versions do that are watched."""
        if worker != self._worker or not self._watched:
            return
        if any(self._inference.fate(self.records[key].manifest).crashes for key in self._watched):
            self._worker_died()
            return
        self._probation.asks(self.now)
        self._probation.counted(self._inference.peek(self.now), self.now)
        for over in self._probation.tick(self.now):
            self._watched.discard(over.deployment_id)
            self._inference.watched(over.deployment_id)
            following = self._updater.probation_over(over.deployment_id, problem=over.problem, report=over.report)
            self._carry_out(following)
        if self._watched:
            self._agenda.at(self.now + LOOK_S, self._look, self._worker)
