"""Rules of encodings: which are made, which a device is offered. Each function works in its caller's transaction."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from agent.protocol.limits import LIMITS
from agent.protocol.manifest import Content, DataFile, Encoding
from fleet_server.catalog.repository import is_kept
from fleet_server.deltas import repository
from fleet_server.models import ArtifactEncoding
from fleet_server.settings import Settings

LEAST_BYTES = 64 * 1024  # of an artifact: below, a chunk is a chunk
WORTH = 0.95  # of the artifact's bytes: what is larger is not worth a device's work
AT_ONCE = 16


@dataclass(frozen=True)
class Pair:
    """An artifact, and the one that devices hold; an empty base stands for none."""

    fleet_id: str
    artifact: str
    base: str


def wanted(session: Session) -> list[Pair]:
    """What open rollouts could use and nobody has tried yet; differences first, for rollouts wait for those."""
    found = repository.missing_differences(session, LEAST_BYTES, AT_ONCE)
    found += repository.missing_full(session, LEAST_BYTES, AT_ONCE)
    return [Pair(*one) for one in found]


def awaiting(session: Session, settings: Settings, rollout_id: str, stage: int) -> set[str]:
    """Deployments of a rollout's stages so far that are not sent yet and that a difference is being made for."""
    return repository.awaiting(session, rollout_id, stage, LEAST_BYTES) if settings.deltas else set()


def record(
    session: Session, pair: Pair, *, codec: str = "", digest: str = "", size: int = 0, detail: str = ""
) -> ArtifactEncoding:
    """Note what became of a pair; without a digest there is nothing to send, and it is not tried again."""
    row = repository.find(session, pair.fleet_id, pair.artifact, pair.base)
    if row is None:
        row = ArtifactEncoding(fleet_id=pair.fleet_id, artifact=pair.artifact, base=pair.base)
        session.add(row)
    row.codec, row.digest, row.size, row.detail = codec, digest, size, detail[:500]
    session.flush()
    return row


class Offers:
    """How artifacts may travel to devices: by encodings that they could decode by what they hold.

    Args:
        session: to read with; it is read once, for all of them.
        fleet_id: of the devices.
        artifacts: digests.
        device_ids: the devices.
    """

    def __init__(self, session: Session, fleet_id: str, artifacts: Collection[str], device_ids: Sequence[str]) -> None:
        self._rows = repository.of_artifacts(session, fleet_id, artifacts) if artifacts else ()
        bases = {row.base for row in self._rows if row.base}
        self._held = repository.holders(session, bases, device_ids) if bases else set()

    def of(self, artifact: str, device_id: str) -> tuple[Encoding, ...]:
        """Those of one artifact for one device, the smallest first."""
        rows = [
            row
            for row in self._rows
            if row.artifact == artifact and (not row.base or (device_id, row.base) in self._held)
        ]
        return tuple(
            Encoding(row.codec, row.digest, row.size, LIMITS.chunk_bytes, row.base) for row in rows[: LIMITS.encodings]
        )


def entitled(session: Session, device_id: str, digest: str) -> Content | None:
    """An encoding of a digest, when it makes what the device ought to run; None otherwise."""
    size = repository.entitled_size(session, device_id, digest)
    return None if size is None else DataFile(digest, size, LIMITS.chunk_bytes)


def forget_orphans(session: Session) -> list[str]:
    """Forget encodings of what is gone; returns the digests whose bytes nobody names any more."""
    rows = repository.orphans(session)
    digests = {row.digest for row in rows if row.digest}
    repository.remove(session, [row.id for row in rows])
    session.flush()
    return sorted(one for one in digests if not repository.is_named(session, one) and not is_kept(session, one))
