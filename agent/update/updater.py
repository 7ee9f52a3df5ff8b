"""What follows from an event: pure. Holds the deployments' records and answers with effects; does no I/O at all.

The supervisor writes the records to the journal before it carries out the effects. After a crash it calls `recover`:
starting again is the only recovery path.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from agent.protocol.errors import WireErrorCode
from agent.protocol.lifecycle import ENDED, SETTLED, Phase, check_transition
from agent.protocol.manifest import Manifest
from agent.protocol.messages import DesiredState, Failure

ATTEMPTS = 5
KEPT_ENDED = 8


class Record(msgspec.Struct):
    """One deployment as the journal holds it.

    Attributes:
        signed: the manifest's bytes as they came: what must have been signed.
        trusted: whether TUF metadata vouched for them. It is asked once: what runs goes on without the network.
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


@dataclass(frozen=True)
class CheckTrust:
    """Find out whether a deployment's manifest was signed, before anything of it is fetched."""

    deployment_id: str


@dataclass(frozen=True)
class Download:
    """Fetch what is missing of a deployment's artifact."""

    deployment_id: str


@dataclass(frozen=True)
class StopDownload:
    """Fetch a deployment's artifact no more."""

    deployment_id: str


@dataclass(frozen=True)
class Verify:
    """Check the digest of an artifact that is in the store."""

    deployment_id: str


@dataclass(frozen=True)
class LoadArtifact:
    """Let the worker load an artifact beside what it serves."""

    deployment_id: str


@dataclass(frozen=True)
class ActivateArtifact:
    """Let the worker answer with a loaded artifact."""

    deployment_id: str


@dataclass(frozen=True)
class UnloadArtifact:
    """Let the worker forget an artifact."""

    model: str
    digest: str


@dataclass(frozen=True)
class BeginProbation:
    """Watch a deployment for some seconds."""

    deployment_id: str
    seconds: float


Effect = (
    CheckTrust | Download | StopDownload | Verify | LoadArtifact | ActivateArtifact | UnloadArtifact | BeginProbation
)


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

    def recover(self) -> list[Effect]:
        """Take up again what was begun before a restart; one that was begun too often fails."""
        effects: list[Effect] = []
        for record in list(self.records.values()):
            if record.phase in SETTLED:
                continue
            record.attempts += record.phase is not Phase.PENDING  # waiting for trust, it did nothing that could crash
            if record.attempts > ATTEMPTS:
                detail = f"the agent restarted {ATTEMPTS} times while it was {record.phase.value}"
                self._fail(record, WireErrorCode.INTERNAL, detail)
                continue
            self._set(record, Phase.PENDING)
            effects += self._begin(record)
        return effects

    def worker_ready(self) -> list[Effect]:
        """A fresh worker has nothing loaded: everything that ought to serve, or was being loaded, is loaded again."""
        phases = {Phase.ACTIVE, Phase.LOADING}
        return [LoadArtifact(one.deployment_id) for one in self.records.values() if one.phase in phases]

    def worker_crashed(self) -> list[Effect]:
        """The worker died: a version that was being loaded or watched is to blame; the one before serves again."""
        for record in list(self.records.values()):
            if record.phase is Phase.LOADING:
                self._fail(
                    record, WireErrorCode.WORKER_CRASHED, "the inference worker died while it loaded the artifact"
                )
            elif record.phase is Phase.PROBATION:
                self._set(record, Phase.ROLLED_BACK)
                detail = "the inference worker died while the version was watched"
                record.failure = Failure(WireErrorCode.WORKER_CRASHED, detail)
        return []

    def desired(self, state: DesiredState) -> list[Effect]:
        """Accept a desired state; one that is not newer changes nothing."""
        if state.revision <= self.revision:
            return []
        self.revision = state.revision
        wanted = {one.deployment_id: one for one in state.deployments}
        manifests = {one.deployment_id: one.read_manifest() for one in state.deployments}
        models = {one.model for one in manifests.values()}
        effects: list[Effect] = []
        for record in list(self.records.values()):
            if record.deployment_id in wanted or record.phase in ENDED:
                continue
            if record.phase is Phase.ACTIVE and record.manifest.model in models:
                continue  # it serves until its successor has proved itself
            effects += self._supersede(record)
        for one in state.deployments:
            if one.deployment_id not in self.records:
                manifest = manifests[one.deployment_id]
                current = self.active(manifest.model)
                record = Record(
                    one.deployment_id,
                    manifest,
                    one.probation_s,
                    one.deadline_s,
                    previous_id=current.deployment_id if current else None,
                    signed=bytes(one.manifest),
                )
                self.records[record.deployment_id] = record
                self._set(record, Phase.PENDING)
                effects += self._begin(record)
        return effects

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
            return [LoadArtifact(deployment_id)]
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
        local = record.phase in {Phase.LOADING, Phase.ACTIVE}
        if local and code is WireErrorCode.DIGEST_MISMATCH and not record.refetched:
            record.refetched = True
            self._set(record, Phase.PENDING)
            return self._begin(record)
        if record.phase is Phase.ACTIVE:
            self._set(record, Phase.ROLLED_BACK)
            record.failure = Failure(code, detail[:2000])
        elif record.phase not in ENDED:
            self._fail(record, code, detail)
        return [StopDownload(deployment_id)]

    def loaded(self, deployment_id: str) -> list[Effect]:
        """The worker has it loaded and warm."""
        record = self.records[deployment_id]
        if record.phase is Phase.ACTIVE and self._watched(record.manifest.model):
            return []  # after a restart the new version may be there first: this one is what it can go back to
        if record.phase in {Phase.ACTIVE, Phase.PROBATION}:
            return [ActivateArtifact(deployment_id)]
        if record.phase is not Phase.LOADING:
            return [UnloadArtifact(record.manifest.model, record.manifest.digest)] if record.phase in ENDED else []
        self._set(record, Phase.PROBATION)
        return [ActivateArtifact(deployment_id), BeginProbation(deployment_id, record.probation_s)]

    def probation_over(self, deployment_id: str, *, problem: str | None) -> list[Effect]:
        """The watching ended: the version stays, or the one before is back."""
        record = self.records[deployment_id]
        if record.phase is not Phase.PROBATION:
            return []
        model = record.manifest.model
        before = self.active(model)
        if problem is None:
            effects: list[Effect] = []
            if before is not None:
                self._set(before, Phase.SUPERSEDED)
                if before.manifest.digest != record.manifest.digest:
                    effects.append(UnloadArtifact(model, before.manifest.digest))
            self._set(record, Phase.ACTIVE)
            return effects
        self._set(record, Phase.ROLLED_BACK)
        record.failure = Failure(WireErrorCode.PROBATION_FAILED, problem)
        back: list[Effect] = [ActivateArtifact(before.deployment_id)] if before else []
        return [*back, UnloadArtifact(model, record.manifest.digest)]

    def active(self, model: str) -> Record | None:
        """The deployment that serves a model for good."""
        phases = (one for one in self.records.values() if one.manifest.model == model and one.phase is Phase.ACTIVE)
        return next(phases, None)

    def uses(self, model: str, digest: str) -> bool:
        """Whether an artifact serves a model, or is about to: another deployment may have brought the same one."""
        phases = {Phase.LOADING, Phase.PROBATION, Phase.ACTIVE}
        mine = [one for one in self.records.values() if one.manifest.model == model and one.manifest.digest == digest]
        return any(one.phase in phases for one in mine)

    def kept_digests(self) -> set[str]:
        """Artifacts that must stay: those in progress, those that serve."""
        return {one.manifest.digest for one in self.records.values() if one.phase not in ENDED}

    def forgettable(self) -> list[str]:
        """Ended deployments beyond the newest few."""
        ended = [one.deployment_id for one in self.records.values() if one.phase in ENDED]
        return ended[:-KEPT_ENDED]

    def _watched(self, model: str) -> bool:
        return any(one.manifest.model == model and one.phase is Phase.PROBATION for one in self.records.values())

    def _begin(self, record: Record) -> list[Effect]:
        if not record.trusted:
            return [CheckTrust(record.deployment_id)]
        self._set(record, Phase.DOWNLOADING)
        return [Download(record.deployment_id)]

    def _supersede(self, record: Record) -> list[Effect]:
        effects: list[Effect] = [StopDownload(record.deployment_id)]
        model, digest = record.manifest.model, record.manifest.digest
        current = self.active(model)
        if record.phase is Phase.PROBATION and current is not None:
            effects.append(ActivateArtifact(current.deployment_id))
        if record.phase in {Phase.PROBATION, Phase.ACTIVE} and (
            current is None or current is record or (current.manifest.digest != digest)
        ):
            effects.append(UnloadArtifact(model, digest))
        self._set(record, Phase.SUPERSEDED)
        return effects

    def _fail(self, record: Record, code: WireErrorCode, detail: str) -> None:
        self._set(record, Phase.FAILED)
        record.failure = Failure(code, detail[:2000])

    def _set(self, record: Record, phase: Phase) -> None:
        record.phase = check_transition(record.phase, phase)
        self.changed.add(record.deployment_id)
