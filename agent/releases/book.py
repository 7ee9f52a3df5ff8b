"""Deployments of the agent's own releases, as the journal holds them, and what follows from an event: pure.

A release goes through the phases of a model's version (`agent.protocol.lifecycle`): `loading` is being unpacked and
waiting for its moment, `probation` is the trial, `active` that it has proved itself. One is wanted at a time.
"""

from __future__ import annotations

import msgspec

from agent.protocol.delivery import DeliveryPolicy, Waiting
from agent.protocol.errors import WireErrorCode
from agent.protocol.lifecycle import ENDED, SETTLED, Phase, check_transition
from agent.protocol.limits import LIMITS
from agent.protocol.manifest import Encoding
from agent.protocol.messages import DeploymentReport, Failure
from agent.protocol.release import AGENT, DesiredRelease, ReleaseManifest, read_manifest
from agent.releases.folder import Failed

ATTEMPTS = 5
KEPT = 4  # that have ended


class ReleaseRecord(msgspec.Struct):
    """One deployment of a release.

    Attributes:
        signed: the manifest's bytes as they came: what must have been signed; `null` for what is installed.
        trusted: whether TUF metadata vouched for them.
        refetched: whether what came was damaged once.
    """

    deployment_id: str
    signed: bytes
    confirm_s: float
    most_starts: int
    deadline_s: float
    phase: Phase = Phase.PENDING
    trusted: bool = False
    refetched: bool = False
    attempts: int = 1
    received_bytes: int = 0
    sources: dict[str, int] = {}
    failure: Failure | None = None
    waiting: Waiting | None = None
    delivery: DeliveryPolicy = DeliveryPolicy()
    encodings: tuple[Encoding, ...] = ()
    failed_encodings: tuple[str, ...] = ()
    decodings: int = 0
    encoding: str = ""

    @property
    def release(self) -> ReleaseManifest | None:
        """What is to run; None for what is installed."""
        return read_manifest(self.signed)

    @property
    def manifest(self) -> ReleaseManifest:
        """What is to be fetched."""
        found = self.release
        assert found is not None  # nothing is fetched of what is installed
        return found

    @property
    def digest(self) -> str:
        """Of the bundle; empty for what is installed."""
        found = self.release
        return found.digest if found else ""

    @property
    def label(self) -> str:
        """What people call it."""
        found = self.release
        return found.label if found else "the installed agent"

    @property
    def server_only(self) -> bool:
        """Whether nothing but the server may bring it: what others brought was damaged once."""
        return self.refetched

    def count(self, source: str, count: int) -> None:
        """Bytes came from a source; of more sources than are reported the rest is counted together."""
        name = source if source in self.sources or len(self.sources) < LIMITS.sources - 1 else "others"
        self.sources[name] = self.sources.get(name, 0) + count


class ReleaseBook:
    """The records.

    Args:
        packed: as `packed` gave them; empty at first.

    Attributes:
        records: by deployment id, the oldest first.
        changed: whether something is to be written down.
        lost: why nothing is there of what was there before; empty when all is well.
    """

    def __init__(self, packed: bytes) -> None:
        self.records: dict[str, ReleaseRecord] = {}
        self.changed = False
        self.lost = ""
        try:
            self.records = {
                one.deployment_id: one for one in msgspec.json.decode(packed or b"[]", type=list[ReleaseRecord])
            }
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self.lost = f"the journal's releases can't be read: {error}"

    def packed(self) -> bytes:
        """All of it, to be kept."""
        return msgspec.json.encode(list(self.records.values()))

    @property
    def open(self) -> ReleaseRecord | None:
        """The one that is under way."""
        return next((one for one in self.records.values() if one.phase not in SETTLED), None)

    def desired(self, wanted: DesiredRelease | None) -> tuple[ReleaseRecord | None, ReleaseRecord | None]:
        """Accept what is wanted; None: whatever runs may go on to.

        Returns:
            A record that is wanted no more and was under way, and one that is new, or is to come otherwise.
        """
        under_way = self.open
        if under_way is not None and (wanted is None or under_way.deployment_id != wanted.deployment_id):
            self.set(under_way, Phase.SUPERSEDED)
        else:
            under_way = None
        if wanted is None:
            return under_way, None
        known = self.records.get(wanted.deployment_id)
        if known is None:
            known = ReleaseRecord(
                wanted.deployment_id,
                bytes(wanted.manifest),
                wanted.confirm_s,
                wanted.most_starts,
                wanted.deadline_s,
                delivery=wanted.delivery,
                encodings=wanted.encodings,
            )
            self._add(known)
            return under_way, known
        if known.delivery == wanted.delivery or known.phase in SETTLED:
            return under_way, None
        known.delivery, self.changed = wanted.delivery, True
        return under_way, known if known.phase is Phase.DOWNLOADING else None

    def recover(self, *, running: str, current: str, on_trial: bool, failed: Failed | None) -> None:
        """Take up what was under way when the agent ended.

        Args:
            running: the digest of the release that runs; empty for what is installed.
            current: of the one that has proved itself.
            on_trial: whether the one that runs is on trial.
            failed: how the trial of what was under way ended badly.
        """
        record = self.open
        if record is None:
            return
        if failed is not None:
            self.taken_back(record, failed)
        elif record.phase is Phase.PROBATION and on_trial:
            return
        elif record.phase is Phase.PROBATION and record.digest == current == running:
            self.set(record, Phase.ACTIVE)  # it proved itself just before the end
        else:
            quiet = record.phase is Phase.PENDING or record.waiting is not None
            record.attempts += not quiet
            if record.attempts > ATTEMPTS:
                detail = f"the agent ended {ATTEMPTS} times while it was {record.phase.value}"
                self.fail(record, WireErrorCode.INTERNAL, detail)
            else:
                self.set(record, Phase.PENDING)

    def taken_back(self, record: ReleaseRecord, failed: Failed) -> None:
        """The launcher took a version back, or never came to start it."""
        if record.phase not in ENDED:
            phase = Phase.ROLLED_BACK if failed.starts else Phase.FAILED
            record.failure = Failure(WireErrorCode.RELEASE_FAILED, failed.reason)
            self.set(record, phase)

    def fail(self, record: ReleaseRecord, code: WireErrorCode, detail: str) -> None:
        """A release will not run here; what runs goes on."""
        if record.phase not in ENDED:
            record.failure = Failure(code, detail[: LIMITS.detail_chars])
            self.set(record, Phase.FAILED)

    def set(self, record: ReleaseRecord, phase: Phase) -> None:
        """Bring a record to another phase; of those that were active, the newest one is."""
        record.phase = check_transition(record.phase, phase)
        record.waiting, self.changed = None, True
        if phase is Phase.ACTIVE:
            for one in self.records.values():
                if one is not record and one.phase is Phase.ACTIVE:
                    one.phase = Phase.SUPERSEDED
        ended = [one.deployment_id for one in self.records.values() if one.phase in ENDED]
        for key in ended[:-KEPT]:
            del self.records[key]

    def reports(self, missing_chunks: int = 0) -> tuple[DeploymentReport, ...]:
        """All of them, as the server is told; of the one that is being fetched, how many chunks it lacks."""
        return tuple(
            DeploymentReport(
                deployment_id=one.deployment_id,
                model=AGENT,
                version=one.release.info.version if one.release else "",
                digest=one.digest,
                phase=one.phase,
                received_bytes=one.received_bytes,
                missing_chunks=missing_chunks if one.phase is Phase.DOWNLOADING else 0,
                failure=one.failure if one.phase in ENDED and one.phase is not Phase.SUPERSEDED else None,
                attempts=one.attempts,
                encoding=one.encoding,
                sources=one.sources,
                waiting=one.waiting,
            )
            for one in self.records.values()
        )

    def _add(self, record: ReleaseRecord) -> None:
        self.records[record.deployment_id] = record
        self.changed = True
