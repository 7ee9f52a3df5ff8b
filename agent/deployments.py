"""This device's deployments: writes down what the updater decides, and then has it done.

It is the one who fetches for deployments, checks what came, and collects what nobody needs. Called by the supervisor's
main loop only. What the worker has to do is `Inference`'s part.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from agent.clock import SteadyClock
from agent.condition import Condition
from agent.database import DatabaseError
from agent.inference import Inference
from agent.protocol.delivery import Waiting
from agent.protocol.errors import WireErrorCode
from agent.protocol.lifecycle import ENDED, SETTLED, Phase
from agent.protocol.messages import DeploymentReport, DesiredDeployment, DesiredState
from agent.protocol.trace import SWITCHED, Mark, TraceReport, parse_traceparent
from agent.source_config import SourceKind
from agent.update.effects import (
    ActivateArtifact,
    BeginProbation,
    CheckTrust,
    Download,
    Effect,
    ExposeArtifact,
    LetServe,
    LoadArtifact,
    StopDownload,
    UnloadArtifact,
    Verify,
)
from agent.update.fetcher import Fetcher
from agent.update.journal import Journal
from agent.update.lastgood import LastGood
from agent.update.pace import Pacer
from agent.update.retriever import Connection, Retriever
from agent.update.store import ArtifactStore
from agent.update.trust_ipc import Target
from agent.update.updater import Record, Updater

log = logging.getLogger("agent")
RETRY_S = 2.0
GOLDEN = ".golden"  # ends the key under which a deployment's golden inputs are fetched; its artifact's is its id


class Judge(Protocol):
    """Who finds out whether manifests were signed."""

    def check(self, key: str, targets: tuple[Target, ...]) -> None:
        """Find it out; the answer comes by `Deployments.trust_answered`."""
        ...

    def cancel(self, key: str) -> None:
        """It need not be known any more."""
        ...


class Deployments:
    """What ought to run here, and how far it has come.

    Args:
        updater: decides.
        journal: where everything is written before it is done.
        good: what served well.
        store: where artifacts are.
        fetcher: fetches what travels.
        pacer: says when a new version may begin to serve.
        link: whether there is one.
        condition: notes what goes wrong with files.
        judge: finds out what was signed.
        others_need: digests that must stay for others than deployments.
        others_use: digests that may stay for others, the most useful first.
        journal_renewed: what others wrote into the journal is to be written again.
        changed: something is to be reported.
    """

    def __init__(
        self,
        updater: Updater,
        journal: Journal,
        good: LastGood,
        store: ArtifactStore,
        fetcher: Fetcher,
        pacer: Pacer,
        link: Connection,
        condition: Condition,
        judge: Judge,
        *,
        others_need: Callable[[], set[str]],
        others_use: Callable[[], list[str]],
        journal_renewed: Callable[[], None],
        changed: Callable[[], None],
    ) -> None:
        self._updater = updater
        self._journal = journal
        self._good = good
        self._store = store
        self._fetcher = fetcher
        self._pacer = pacer
        self._condition = condition
        self._judge = judge
        self._others_need, self._others_use = others_need, others_use
        self._journal_renewed = journal_renewed
        self._changed = changed
        self._retriever = Retriever(store, fetcher, link, self._save_record)
        self._inference: Inference | None = None
        self._held_back: set[str] = set()  # deployments that have come, and wait for their time
        self._next_steps = {Phase.VERIFYING: self._verify, Phase.EXPOSED: self._let_serve}
        self._waiting: list[Effect] = []  # for the journal: nothing is done before it is written
        self._written_revision = updater.revision
        self._retry_at = 0.0
        self._clock = SteadyClock()
        self._logged = {key: record.phase for key, record in updater.records.items()}

    @property
    def busy(self) -> bool:
        """Whether something is fetched or decoded, or waits for the journal."""
        return bool(self._waiting or self._updater.changed) or self._fetcher.busy or self._retriever.busy

    def begin(self, inference: Inference) -> None:
        """Take up what an earlier run left."""
        self._inference = inference
        self.carry_out(self._updater.recover())
        self.collect_garbage()  # an earlier run may have ended between forgetting a file's user and the file

    def desired(self, state: DesiredState) -> bool:
        """Accept a desired state; false when it is not newer than what is known."""
        fresh = state.revision > self._updater.revision
        effects = self._updater.desired(state)
        if fresh:
            ordered = {one.manifest.model for one in self._updater.records.values() if one.ordered}
            models = {one.read_manifest().model for one in state.deployments}
            self._condition.guard(lambda: self._good.retain(models | ordered))
        self.carry_out(effects)
        return fresh

    def ordered(self, deployments: Sequence[DesiredDeployment]) -> None:
        """Accept what a bundle orders."""
        self.carry_out(self._updater.ordered(deployments))

    def trust_answered(self, key: str, code: WireErrorCode | None, detail: str) -> None:
        """A deployment's manifest was judged."""
        if key in self._updater.records:
            found = self._updater
            self.carry_out(found.trusted(key) if code is None else found.failed(key, code, detail))

    def switched(self, deployment_id: str) -> None:
        """The worker answers with a deployment's artifact."""
        record = self._updater.records.get(deployment_id)
        if record is not None and record.phase is Phase.PROBATION:
            record.mark(SWITCHED, self._clock())
            self._updater.changed.add(deployment_id)

    @property
    def trying(self) -> bool:
        """Whether a version is looked at, loaded or watched: what an end of the agent would be held against it."""
        records = self._updater.records.values()
        return any(one.phase in {Phase.VERIFYING, Phase.LOADING, Phase.PROBATION} for one in records)

    def reports(self) -> tuple[DeploymentReport, ...]:
        """All of them, as the server is told."""
        return tuple(self._report(record) for record in self._updater.records.values())

    def tick(self) -> None:
        """See what became of what is fetched; go on with what waited."""
        now = time.monotonic()
        self._fetcher.tick(now)
        self._retriever.tick(now)
        self._let_in()

    def tick_journal(self) -> None:
        """Write what could not be written before."""
        if time.monotonic() >= self._retry_at and (self._updater.changed or self._waiting):
            self.carry_out([])
        self.write_revision()

    def stop(self) -> None:
        """End what is being decoded."""
        self._retriever.stop()

    # -- what is fetched

    def received(self, key: str, count: int, source: str) -> None:
        """Bytes came for a deployment; those of a stick came over no network."""
        record = self._updater.records[key.removesuffix(GOLDEN)]
        record.count(source, count)
        record.received_bytes += 0 if source.startswith(SourceKind.USB.value) else count

    def waits(self, key: str, waiting: Waiting | None) -> None:
        """What is fetched for a deployment must wait, or goes on."""
        deployment_id = key.removesuffix(GOLDEN)
        if deployment_id in self._updater.records:
            self._updater.waits(deployment_id, waiting)
            self._save()

    def fetched(self, key: str) -> None:
        """A deployment's golden inputs came, which are small and come first, or its artifact, and with it all."""
        record = self._updater.records[key.removesuffix(GOLDEN)]
        if key.endswith(GOLDEN):
            self._retriever.begin(record, self, time.monotonic())
        else:
            self.carry_out(self._updater.downloaded(key))

    def fetch_failed(self, key: str, code: WireErrorCode, detail: str) -> None:
        """Something of a deployment will not come."""
        self.carry_out(self._updater.failed(key.removesuffix(GOLDEN), code, detail))

    # -- carrying out

    def carry_out(self, effects: list[Effect]) -> None:
        """Do what follows, once it is written down. What serves is loaded and answers all the same."""
        urgent = [effect for effect in effects if self._waiting and self._needs_no_journal(effect)]
        for effect in urgent:
            self._carry_out_one(effect)
        self._waiting += [effect for effect in effects if effect not in urgent]
        while self._save() and self._waiting:
            effect = self._waiting.pop(0)
            try:
                self._carry_out_one(effect)
            except Exception as error:
                log.exception("%s could not be done", effect)
                self._give_up(effect, f"{type(error).__name__}: {str(error)[:500]}")

    def _needs_no_journal(self, effect: Effect) -> bool:
        if not isinstance(effect, LoadArtifact | ActivateArtifact) or effect.deployment_id in self._updater.changed:
            return False
        record = self._updater.records.get(effect.deployment_id)
        return record is not None and record.phase is Phase.ACTIVE

    def _give_up(self, effect: Effect, detail: str) -> None:
        """A deployment that can't go on says so, and does not hang."""
        record = None if isinstance(effect, UnloadArtifact) else self._updater.records.get(effect.deployment_id)
        if record is not None and record.phase not in SETTLED:
            self.carry_out(self._updater.failed(record.deployment_id, WireErrorCode.INTERNAL, detail))

    def _save(self) -> bool:
        """The journal is written before anything is done; false when it can't be now."""
        if not self._updater.changed:
            return True
        changed = {key: self._updater.records[key] for key in self._updater.changed}
        for record in changed.values():
            record.mark(record.phase.value, self._clock())
        try:
            self._journal.save(changed)
        except DatabaseError as error:
            self._journal_failed(error)
            return False
        self._updater.changed.clear()
        for record in changed.values():
            self._log_phase(record)
        self._condition.guard(lambda: self._good.update(self._updater.records.values()))
        self._condition.guard(self._forget)
        self.collect_garbage()
        self._changed()
        return True

    def _log_phase(self, record: Record) -> None:
        """Once a phase: a record also changes in what only the journal cares for."""
        if self._logged.get(record.deployment_id) is not record.phase:
            self._logged[record.deployment_id] = record.phase
            why = f": {record.failure.detail}" if record.failure is not None else ""
            traced = parse_traceparent(record.traceparent)
            ids = {"deployment": record.deployment_id, "trace_id": traced.trace_id if traced else None}
            log.info(
                "%s@%s is %s%s", record.manifest.model, record.manifest.version, record.phase.value, why, extra=ids
            )

    def _save_record(self, record: Record) -> None:
        """What became of one of a deployment's encodings."""
        self._updater.changed.add(record.deployment_id)
        self._save()

    def _forget(self) -> None:
        forgotten = self._updater.forgettable()
        self._journal.forget(forgotten)
        for key in forgotten:
            del self._updater.records[key]
            self._logged.pop(key, None)

    def collect_garbage(self) -> None:
        """Remove what nobody needs."""
        kept = self._updater.kept_digests() | self._others_need() | self._good.needed()
        self._store.collect_garbage(kept, [*self._others_use(), *self._good.useful()])

    def _carry_out_one(self, effect: Effect) -> None:
        assert self._inference is not None  # or else nothing has begun
        record = None if isinstance(effect, UnloadArtifact) else self._updater.records.get(effect.deployment_id)
        match effect:
            case UnloadArtifact():
                self._inference.unload(effect.model, effect.digest)
            case CheckTrust() if record is not None:
                target = Target(record.manifest.target_path, record.signed)
                self._judge.check(record.deployment_id, (target,))
            case Download() if record is not None:
                self._fetch(record)
            case StopDownload():
                self._judge.cancel(effect.deployment_id)
                self._retriever.cancel(effect.deployment_id)
                self._fetcher.cancel(effect.deployment_id + GOLDEN)
                self._inference.end_probation(effect.deployment_id)
            case Verify() if record is not None:
                self._verify(record)
            case LetServe() if record is not None:
                self._let_serve(record)
            case LoadArtifact() | ActivateArtifact() | BeginProbation() | ExposeArtifact() if record is not None:
                self._inference.do(effect, record)
            case _:
                pass

    def _fetch(self, record: Record) -> None:
        """Golden inputs first: they are small, and a device that can't have them need not fetch the rest."""
        golden, now = record.manifest.golden, time.monotonic()
        if golden is None or self._store.verify(golden.digest):  # one that lies there damaged comes anew
            self._retriever.begin(record, self, now)
        else:
            key = record.deployment_id + GOLDEN
            self._fetcher.begin(
                key,
                golden,
                self,
                deadline_s=record.deadline_s,
                now=now,
                server_only=record.server_only,
                delivery=record.delivery,
            )

    def _verify(self, record: Record) -> None:
        """Check what came; what is good but may not serve yet is held until it may."""
        verified = [self._store.verify(content.digest) for content in record.manifest.contents]
        good = all(verified)
        if good and self._held(record):
            return
        self.carry_out(self._updater.verified(record.deployment_id, good=good))

    def _let_serve(self, record: Record) -> None:
        """Let what was exposed serve in full, when it may."""
        if not self._held(record):
            self.carry_out(self._updater.may_serve(record.deployment_id))

    def _held(self, record: Record) -> bool:
        """Whether a deployment may not begin to serve yet; it is gone on with when it may."""
        waiting = self._pacer.activation(record.delivery)
        if waiting is None:
            return False
        self._held_back.add(record.deployment_id)
        self._updater.waits(record.deployment_id, waiting)
        self._save()
        return True

    def _let_in(self) -> None:
        """Go on with deployments that waited until now."""
        for key in list(self._held_back):
            record = self._updater.records.get(key)
            step = self._next_steps.get(record.phase) if record is not None else None
            if record is None or step is None:
                self._held_back.discard(key)
            elif self._pacer.activation(record.delivery) is None:
                self._held_back.discard(key)
                step(record)

    # -- the journal

    def write_revision(self) -> None:
        """Only after everything that came with it: a device that forgets must be told again."""
        if not (self._waiting or self._updater.changed) and self._written_revision != self._updater.revision:
            self._journal.keep_number("revision", self._updater.revision)
            self._written_revision = self._updater.revision

    def _journal_failed(self, error: DatabaseError) -> None:
        self._retry_at = time.monotonic() + RETRY_S
        if self._condition.journal_failed(error):
            self._updater.changed.update(self._updater.records)
            self._written_revision = -1
            self._journal_renewed()

    def _report(self, record: Record) -> DeploymentReport:
        seen = self._inference.seen(record.deployment_id) if self._inference is not None else None
        download = self._retriever.progress(record.deployment_id)
        failure = record.failure if record.phase in ENDED and record.phase is not Phase.SUPERSEDED else None
        return DeploymentReport(
            deployment_id=record.deployment_id,
            model=record.manifest.model,
            version=record.manifest.version,
            digest=record.manifest.digest,
            phase=record.phase,
            received_bytes=record.received_bytes,
            missing_chunks=download.part.missing if download else 0,
            failure=failure,
            attempts=record.attempts,
            probation=seen or record.probation,
            encoding=record.encoding,
            sources=record.sources,
            waiting=record.waiting,
            loading_s=self._inference.loading_s(record.deployment_id) if self._inference is not None else 0.0,
            exposure=self._inference.exposure(record.deployment_id) if self._inference is not None else None,
            trace=self._trace(record),
        )

    def _trace(self, record: Record) -> TraceReport | None:
        if not record.traceparent:
            return None
        now = self._clock()
        return TraceReport(record.traceparent, tuple(Mark(name, round(now - at, 6)) for name, at in record.marks))
