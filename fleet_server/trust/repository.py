"""Every query over a fleet's TUF repository."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, func, or_, select
from sqlalchemy.orm import Session

from fleet_server.models import Fleet, TrustMetadata, TrustProposal, TrustTarget

KEPT_VERSIONS = 5


def fleets(session: Session) -> list[str]:
    """Every fleet."""
    return list(session.scalars(select(Fleet.id).order_by(Fleet.id)))


def lock(session: Session, fleet_id: str) -> None:
    """Let nobody else change the fleet's repository until the transaction ends."""
    # Not FOR UPDATE: rows that refer to the fleet, such as those of the audit log, lock its key, and must not wait.
    session.get_one(Fleet, fleet_id, with_for_update={"key_share": True}, populate_existing=True)


def latest(session: Session, fleet_id: str) -> dict[str, bytes]:
    """The newest metadata of each role."""
    newest = (
        select(TrustMetadata.role, func.max(TrustMetadata.version).label("version"))
        .where(TrustMetadata.fleet_id == fleet_id)
        .group_by(TrustMetadata.role)
        .subquery()
    )
    query = select(TrustMetadata.role, TrustMetadata.body).join(
        newest, (TrustMetadata.role == newest.c.role) & (TrustMetadata.version == newest.c.version)
    )
    rows = session.execute(query.where(TrustMetadata.fleet_id == fleet_id)).all()
    return {row.role: row.body for row in rows}


def metadata(session: Session, fleet_id: str, role: str, version: int | None) -> bytes | None:
    """One version of a role's metadata; its newest without a version."""
    query = select(TrustMetadata.body).where(TrustMetadata.fleet_id == fleet_id, TrustMetadata.role == role)
    if version is not None:
        query = query.where(TrustMetadata.version == version)
    return session.scalars(query.order_by(TrustMetadata.version.desc()).limit(1)).first()


def add_metadata(session: Session, fleet_id: str, role: str, version: int, body: bytes) -> None:
    """Publish metadata. Old versions go, but those of the root: devices follow the chain of them."""
    session.add(TrustMetadata(fleet_id=fleet_id, role=role, version=version, body=body))
    session.execute(delete(TrustProposal).where(TrustProposal.fleet_id == fleet_id, TrustProposal.role == role))
    if role != "root":
        session.execute(
            delete(TrustMetadata).where(
                TrustMetadata.fleet_id == fleet_id,
                TrustMetadata.role == role,
                TrustMetadata.version <= version - KEPT_VERSIONS,
            )
        )
    session.flush()


def targets(session: Session, fleet_id: str) -> Sequence[TrustTarget]:
    """Every manifest that is to be signed, or is."""
    query = select(TrustTarget).where(TrustTarget.fleet_id == fleet_id).order_by(TrustTarget.path)
    return session.scalars(query).all()


def target(session: Session, fleet_id: str, path: str) -> TrustTarget | None:
    """One of them."""
    return session.get(TrustTarget, (fleet_id, path))


def delete_targets(session: Session, fleet_id: str, variant_id: str, *, keep: frozenset[str] = frozenset()) -> None:
    """Forget a variant's manifests, but those of the named paths."""
    of_variant = or_(
        TrustTarget.path.endswith(f"/{variant_id}.json"), TrustTarget.path.startswith(f"trials/{variant_id}.")
    )
    session.execute(
        delete(TrustTarget).where(TrustTarget.fleet_id == fleet_id, of_variant, TrustTarget.path.not_in(keep))
    )


def proposal(session: Session, fleet_id: str, role: str) -> bytes | None:
    """Metadata of a role that waits for signatures."""
    found = session.get(TrustProposal, (fleet_id, role))
    return found.body if found else None


def keep_proposal(session: Session, fleet_id: str, role: str, body: bytes) -> None:
    """Let metadata wait for signatures, in the place of what waited before."""
    session.merge(TrustProposal(fleet_id=fleet_id, role=role, body=body))
    session.flush()


def drop_proposal(session: Session, fleet_id: str, role: str) -> None:
    """Let nothing of a role wait."""
    session.execute(delete(TrustProposal).where(TrustProposal.fleet_id == fleet_id, TrustProposal.role == role))
