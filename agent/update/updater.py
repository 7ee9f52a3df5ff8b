"""What follows from an event: pure. Holds the deployments' records and answers with effects; does no I/O at all.

The supervisor writes the records to the journal before it carries out the effects. After a crash it calls `recover`:
starting again is the only recovery path.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from agent.protocol.delivery import DeliveryPolicy, Waiting
from agent.protocol.errors import WireErrorCode
from agent.protocol.lifecycle import ENDED, SETTLED, Phase, check_transition
from agent.protocol.limits import LIMITS
from agent.protocol.manifest import Encoding, Manifest
from agent.protocol.messages import (
    DesiredDeployment,
    DesiredState,
    Exposure,
    Failure,
    ProbationPolicy,
    ProbationReport,
)
from agent.protocol.trace import marked
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

ATTEMPTS = 5
INTERRUPTIONS = 3
KEPT_ENDED = 8


class Record(msgspec.Struct):
    """One deployment as the journal holds it.

    Attributes:
        signed: the manifest's bytes as they came: what must have been signed.
        encodings: ways its artifact may travel, the smallest first.
        failed_encodings: digests of those that were tried and are not tried again.
        decodings: how often decoding the one that is being tried was begun.
        encoding: codec that brought the artifact; empty when it came as it is, or has not come.
        sources: bytes that each source brought.
        ordered: whether a bundle brought it, and no server.
        delivery: how the artifact may come, and when it may begin to serve.
        waiting: what it stands still for.
        trusted: whether TUF metadata vouched for them. It is asked once: what runs goes on without the network.
        policy: how it is watched; None of a record from before there were policies.
        probation: what was seen of it while it was watched.
        served: whether it ever answered requests.
        interrupted: how often the agent ended while it was loaded or watched.
        replaces: whether the version before was taken out to make room for it.
        exposure: how it runs beside the version before; None: it is to serve in full.
        traceparent: the span that brought it; empty when nobody traces it.
        marks: phases and other steps with their times, of one that is traced.
        wanted: whether the desired state names it: then it is not forgotten, or it would be tried again.
    """

    deployment_id: str
    manifest: Manifest
    probation_s: float
    deadline_s: float
    phase: Phase = Phase.PENDING
    received_bytes: int = 0
    failure: Failure | None = None
    attempts: int = 1
    refetched: bool = False
    previous_id: str | None = None
    signed: bytes = b""
    trusted: bool = False
    policy: ProbationPolicy | None = None
    probation: ProbationReport | None = None
    served: bool = False
    interrupted: int = 0
    replaces: bool = False
    wanted: bool = False
    encodings: tuple[Encoding, ...] = ()
    failed_encodings: tuple[str, ...] = ()
    decodings: int = 0
    encoding: str = ""
    sources: dict[str, int] = {}
    ordered: bool = False
    delivery: DeliveryPolicy = DeliveryPolicy()
    waiting: Waiting | None = None
    exposure: Exposure | None = None
    traceparent: str = ""
    marks: tuple[tuple[str, float], ...] = ()

    @property
    def watching(self) -> ProbationPolicy:
        """How it is watched."""
        return self.policy or ProbationPolicy(seconds=self.probation_s)

    @property
    def label(self) -> str:
        """What people call it."""
        return f"{self.manifest.model}@{self.manifest.version}"

    @property
    def server_only(self) -> bool:
        """Whether nothing but the server may bring it: what others brought was damaged once."""
        return self.refetched and not self.ordered

    def mark(self, name: str, at: float) -> None:
        """Note when it came to a step, where it is traced."""
        if self.traceparent:
            self.marks = marked(self.marks, name, at)

    def count(self, source: str, count: int) -> None:
        """Bytes came from a source; of more sources than are reported the rest is counted together."""
        name = source if source in self.sources or len(self.sources) < LIMITS.sources - 1 else "others"
        self.sources[name] = self.sources.get(name, 0) + count


class Updater:
    """The deployments of a device.

    Attributes:
        records: by deployment id.
        revision: of the desired state last accepted.
        changed: ids of records that changed since the caller last cleared it.
    """

    def __init__(self, records: dict[str, Record], revision: int) -> None:
        self.records = records
        self.revision = revision
        self.changed: set[str] = set()
        self._worker_up = True  # what it is told while it starts waits for it
        self._asked: set[str] = set()  # that the worker was told to load
        self._loaded: set[str] = set()  # that it holds

    def recover(self) -> list[Effect]:
        """Take up again what was begun before a restart; one that was begun too often fails."""
        effects: list[Effect] = []
        for record in list(self.records.values()):
            if record.phase in SETTLED:
                continue
            # What waited, for trust or for its time, did nothing that could crash; what is exposed may be so for weeks.
            quiet = record.phase in {Phase.PENDING, Phase.EXPOSED} or record.waiting is not None
            record.attempts += not quiet
            record.interrupted += record.phase in {Phase.LOADING, Phase.PROBATION}
            record.replaces = False
            if record.interrupted >= INTERRUPTIONS:
                detail = f"the agent ended {INTERRUPTIONS} times while it loaded or watched the version"
                code = WireErrorCode.PROBATION_FAILED if record.served else WireErrorCode.INTERNAL
                self._fail(record, code, detail)
                continue
            if record.attempts > ATTEMPTS:
                detail = f"the agent restarted {ATTEMPTS} times while it was {record.phase.value}"
                self._fail(record, WireErrorCode.INTERNAL, detail)
                continue
            self._set(record, Phase.PENDING)
            effects += self._begin(record)
        return effects

    def worker_ready(self) -> list[Effect]:
        """A fresh worker has nothing loaded: what ought to serve is loaded, and then what waits for that."""
        self._worker_up = True
        active = [one.deployment_id for one in self.records.values() if one.phase is Phase.ACTIVE]
        return [*(LoadArtifact(one) for one in active), *self._load_waiting()]

    def worker_leaves(self) -> None:
        """The worker is being replaced, and watches and loads nothing: what comes meanwhile waits for the next one."""
        self._worker_up = False
        self._asked, self._loaded = set(), set()

    def worker_crashed(self, seen: dict[str, ProbationReport]) -> list[Effect]:
        """The worker died: a version that was being loaded or watched is to blame; the one before serves again.

        Args:
            seen: of the versions that were watched.
        """
        asked, self._worker_up = self._asked, False
        self._asked, self._loaded = set(), set()
        for record in list(self.records.values()):
            if record.phase is Phase.LOADING and record.deployment_id in asked:
                self._fail(
                    record, WireErrorCode.WORKER_CRASHED, "the inference worker died while it loaded the artifact"
                )
            elif record.phase in {Phase.PROBATION, Phase.EXPOSED}:
                record.probation = seen.get(record.deployment_id)
                self._fail(
                    record, WireErrorCode.WORKER_CRASHED, "the inference worker died while the version was watched"
                )
        return []

    def desired(self, state: DesiredState) -> list[Effect]:
        """Accept a desired state; one that is not newer changes nothing."""
        if state.revision <= self.revision:
            return []
        self.revision = state.revision
        return self._want(state.deployments, ordered=False)

    def ordered(self, deployments: Sequence[DesiredDeployment]) -> list[Effect]:
        """Accept what a bundle orders, which was judged; it holds until the server, or another order, says more.

        Its ids are made of what is to run: what ended before is tried anew.
        """
        for one in deployments:
            known = self.records.get(one.deployment_id)
            if known is not None and known.phase in ENDED:
                del self.records[one.deployment_id]
        return self._want(deployments, ordered=True)

    def _want(self, deployments: Sequence[DesiredDeployment], *, ordered: bool) -> list[Effect]:
        wanted = {one.deployment_id: one for one in deployments}
        manifests = {one.deployment_id: one.read_manifest() for one in deployments}
        models = {one.model for one in manifests.values()}
        effects: list[Effect] = []
        for record in list(self.records.values()):
            if record.wanted != (record.deployment_id in wanted):
                record.wanted = not record.wanted
                self.changed.add(record.deployment_id)
            if record.deployment_id in wanted or record.phase in ENDED:
                continue
            if record.phase is Phase.ACTIVE and record.manifest.model in models:
                continue  # it serves until its successor has proved itself
            if record.ordered and not ordered and record.manifest.model not in models:
                continue  # the server never heard of it
            effects += self._supersede(record)
        for one in deployments:
            known = self.records.get(one.deployment_id)
            if known is None or known.phase is Phase.SUPERSEDED:
                # What gave way to another and is wanted again, such as by a server that was restored, is tried anew.
                manifest = manifests[one.deployment_id]
                current = self.active(manifest.model)
                record = Record(
                    one.deployment_id,
                    manifest,
                    one.probation_s,
                    one.deadline_s,
                    previous_id=current.deployment_id if current else None,
                    signed=bytes(one.manifest),
                    policy=one.policy,
                    wanted=True,
                    encodings=one.encodings,
                    trusted=ordered,
                    ordered=ordered,
                    delivery=one.delivery,
                    exposure=one.exposure,
                    traceparent=one.traceparent,
                )
                self.records[record.deployment_id] = record
                self._set(record, Phase.PENDING)
                effects += self._begin(record)
            else:
                effects += self._change(known, one)
        return effects

    def _change(self, known: Record, wanted: DesiredDeployment) -> list[Effect]:
        """A deployment is to come otherwise than before, or to be let in further."""
        effects: list[Effect] = []
        if known.delivery != wanted.delivery:
            known.delivery = wanted.delivery
            self.changed.add(known.deployment_id)
            effects += [Download(known.deployment_id)] if known.phase is Phase.DOWNLOADING else []
        if known.exposure != wanted.exposure:
            known.exposure = wanted.exposure
            self.changed.add(known.deployment_id)
            effects += self._expose(known) if known.phase is Phase.EXPOSED else []
        return effects

    def _expose(self, record: Record) -> list[Effect]:
        before = self._beside(record)
        if before is None:
            return [LetServe(record.deployment_id)]
        return [ExposeArtifact(record.deployment_id, before.deployment_id)]

    def may_serve(self, deployment_id: str) -> list[Effect]:
        """A deployment that ran beside another may serve in full now."""
        record = self.records[deployment_id]
        return self._serve(record) if record.phase is Phase.EXPOSED and self._beside(record) is None else []

    def _serve(self, record: Record) -> list[Effect]:
        self._set(record, Phase.PROBATION)
        before = self.active(record.manifest.model)
        return [
            ActivateArtifact(record.deployment_id),
            BeginProbation(record.deployment_id, before.deployment_id if before else None),
        ]

    def waits(self, deployment_id: str, waiting: Waiting | None) -> None:
        """A deployment stands still on purpose, or goes on."""
        record = self.records[deployment_id]
        if record.waiting != waiting:
            record.waiting = waiting
            self.changed.add(deployment_id)

    def trusted(self, deployment_id: str) -> list[Effect]:
        """The manifest was signed by whom it must be."""
        record = self.records[deployment_id]
        if record.phase is not Phase.PENDING:
            return []
        record.trusted = True
        return self._begin(record)

    def downloaded(self, deployment_id: str) -> list[Effect]:
        """Every chunk is there."""
        record = self.records[deployment_id]
        if record.phase is not Phase.DOWNLOADING:
            return []
        self._set(record, Phase.VERIFYING)
        return [Verify(deployment_id)]

    def verified(self, deployment_id: str, *, good: bool) -> list[Effect]:
        """The digest was checked; a wrong one is fetched again once."""
        record = self.records[deployment_id]
        if record.phase is not Phase.VERIFYING:
            return []
        if good:
            self._set(record, Phase.LOADING)
            return self._load_waiting()
        if not record.refetched:
            record.refetched = True
            self._set(record, Phase.DOWNLOADING)
            return [Download(deployment_id)]
        detail = "the bytes that came, twice, are not those of the manifest's digest; they were thrown away"
        self._fail(record, WireErrorCode.DIGEST_MISMATCH, detail)
        return []

    def failed(self, deployment_id: str, code: WireErrorCode, detail: str) -> list[Effect]:
        """A download or a load did not work; what served before goes on. What the disk damaged comes anew."""
        record = self.records[deployment_id]
        self._asked.discard(deployment_id)
        local = record.phase in {Phase.LOADING, Phase.ACTIVE}
        if local and code is WireErrorCode.DIGEST_MISMATCH and not record.refetched:
            record.refetched = True
            self._set(record, Phase.PENDING)
            return [*self._begin(record), *self._load_waiting()]
        if record.phase is Phase.LOADING and code is WireErrorCode.MEMORY_SHORT and (room := self._make_room(record)):
            return room
        back: list[Effect] = []
        if record.phase not in ENDED:
            self._fail(record, code, detail)
            back = self._back(record) if record.replaces else []
        return [StopDownload(deployment_id), *back, *self._load_waiting()]

    def _make_room(self, record: Record) -> list[Effect]:
        """Take the version before out, where that was allowed and not done yet."""
        before = self.active(record.manifest.model)
        if before is None or record.replaces or not record.watching.replace_when_short or record.exposure is not None:
            return []
        record.replaces = True
        self._asked.add(record.deployment_id)
        self.changed.add(record.deployment_id)
        self._loaded.discard(before.deployment_id)
        return [*self._unload(before), LoadArtifact(record.deployment_id)]

    def loaded(self, deployment_id: str) -> list[Effect]:
        """The worker has it loaded and warm, and it answered its golden inputs."""
        record = self.records[deployment_id]
        self._asked.discard(deployment_id)
        if record.phase is Phase.ACTIVE:
            self._loaded.add(deployment_id)
            watched = any(one.phase is Phase.PROBATION for one in self._of(record.manifest.model))
            activate: list[Effect] = [] if watched else [ActivateArtifact(deployment_id)]
            return [*activate, *self._load_waiting()]
        if record.phase is Phase.PROBATION:  # the worker had lost it
            self._loaded.add(deployment_id)
            return [ActivateArtifact(deployment_id)]
        if record.phase is Phase.EXPOSED:
            self._loaded.add(deployment_id)
            return self._expose(record)
        if record.phase is not Phase.LOADING:
            return self._unload(record) if record.phase in ENDED else []
        self._loaded.add(deployment_id)
        record.served = True
        if self._beside(record) is None:
            return self._serve(record)
        self._set(record, Phase.EXPOSED)
        return self._expose(record)

    def _beside(self, record: Record) -> Record | None:
        """What a version is to run beside; None when it is to serve in full, or there is nothing to run beside."""
        before = self.active(record.manifest.model)
        if record.exposure is None or before is None or before.manifest.digest == record.manifest.digest:
            return None
        return before

    def probation_over(
        self, deployment_id: str, *, problem: str | None, report: ProbationReport | None = None
    ) -> list[Effect]:
        """The watching ended: the version stays, or the one before is back."""
        record = self.records[deployment_id]
        if record.phase not in {Phase.PROBATION, Phase.EXPOSED}:
            return []
        record.probation = report
        if problem is not None:
            beside = record.phase is Phase.EXPOSED
            self._fail(record, WireErrorCode.PROBATION_FAILED, problem)
            return self._unload(record) if beside else self._back(record)
        if record.phase is Phase.EXPOSED:
            return []  # only the server lets it in further
        before = self.active(record.manifest.model)
        if before is not None:
            self._set(before, Phase.SUPERSEDED)
        self._set(record, Phase.ACTIVE)
        return self._unload(before) if before is not None else []

    def _load_waiting(self) -> list[Effect]:
        """Let the worker load what is to be tried. What ought to serve goes first, and is served before that begins."""
        effects: list[Effect] = []
        for record in self.records.values() if self._worker_up else ():
            key, before = record.deployment_id, self.active(record.manifest.model)
            waits = before is not None and before.deployment_id not in self._loaded
            if record.phase is Phase.LOADING and key not in self._asked and not waits:
                self._asked.add(key)
                effects.append(LoadArtifact(key))
        return effects

    def _back(self, record: Record) -> list[Effect]:
        """Let the version before a deployment answer again, and the worker forget the deployment's artifact."""
        before = self.active(record.manifest.model)
        unload = self._unload(record)
        if before is None:
            return unload
        if before.deployment_id in self._loaded and before.manifest.digest != record.manifest.digest:
            return [ActivateArtifact(before.deployment_id), *unload]
        return [*unload, LoadArtifact(before.deployment_id)]  # it was taken out, or is counted under the other's name

    def _unload(self, record: Record) -> list[Effect]:
        """Let the worker forget a deployment's artifact, unless another deployment runs the same bytes."""
        self._loaded.discard(record.deployment_id)
        model, digest = record.manifest.model, record.manifest.digest
        others = [one for one in self._running(model, digest) if one is not record]
        return [] if others else [UnloadArtifact(model, digest)]

    def _of(self, model: str) -> list[Record]:
        return [one for one in self.records.values() if one.manifest.model == model]

    def active(self, model: str) -> Record | None:
        """The deployment that serves a model for good."""
        return next((one for one in self._of(model) if one.phase is Phase.ACTIVE), None)

    def uses(self, model: str, digest: str) -> bool:
        """Whether an artifact serves a model, or is about to: another deployment may have brought the same one."""
        return bool(self._running(model, digest))

    def _running(self, model: str, digest: str) -> list[Record]:
        """Deployments of an artifact that the worker has, or is about to have."""
        running = {Phase.LOADING, Phase.EXPOSED, Phase.PROBATION, Phase.ACTIVE}
        return [one for one in self._of(model) if one.manifest.digest == digest and one.phase in running]

    def kept_digests(self) -> set[str]:
        """What must stay: artifacts in progress and those that serve; of what is fetched, encodings and their bases."""
        used = [one.manifest for one in self.records.values() if one.phase not in ENDED]
        kept = {content.digest for one in used for content in one.contents}
        for record in self.records.values():
            if record.phase in {Phase.PENDING, Phase.DOWNLOADING}:
                left = [one for one in record.encodings if one.digest not in record.failed_encodings]
                kept |= {digest for one in left for digest in (one.digest, one.base) if digest}
        return kept

    def forgettable(self) -> list[str]:
        """Ended deployments beyond the newest few, that nobody wants: what is still wanted must not be tried again."""
        ended = [one for one in self.records.values() if one.phase in ENDED]
        return [one.deployment_id for one in ended[:-KEPT_ENDED] if not one.wanted]

    def _begin(self, record: Record) -> list[Effect]:
        if not record.trusted:
            return [CheckTrust(record.deployment_id)]
        self._set(record, Phase.DOWNLOADING)
        return [Download(record.deployment_id)]

    def _supersede(self, record: Record) -> list[Effect]:
        phase = record.phase
        self._set(record, Phase.SUPERSEDED)
        effects: list[Effect] = [StopDownload(record.deployment_id)]
        if phase is Phase.PROBATION or record.replaces:
            effects += self._back(record)
        elif phase in {Phase.ACTIVE, Phase.EXPOSED}:
            effects += self._unload(record)
        return effects

    def _fail(self, record: Record, code: WireErrorCode, detail: str) -> None:
        self._set(record, Phase.ROLLED_BACK if record.served or record.phase is Phase.ACTIVE else Phase.FAILED)
        record.failure = Failure(code, detail[:2000])

    def _set(self, record: Record, phase: Phase) -> None:
        record.phase = check_transition(record.phase, phase)
        record.waiting = None
        self.changed.add(record.deployment_id)
