"""What people are shown of a fleet's repository: roles as they are published, and what waits for whose signature."""

from __future__ import annotations

import hashlib

from sqlalchemy.orm import Session

from fleet_server.settings import Settings
from fleet_server.trust import metadata as tuf
from fleet_server.trust import repository, service
from fleet_server.trust.metadata import TOP_ROLES, AnyMetadata
from fleet_server.trust.schemas import ProposalView, RoleView, TrustView, WaitingManifest


def trust_view(session: Session, settings: Settings, fleet_id: str) -> TrustView:
    """The whole repository."""
    found = service.ensure(session, settings, fleet_id)
    held = set(service.key_folder(settings, fleet_id).load())
    published = {"root": found.root, "targets": found.targets, "snapshot": found.snapshot, "timestamp": found.timestamp}
    published |= found.delegated
    roles = []
    for role, one in published.items():
        delegator = found.root if role in TOP_ROLES else found.targets
        if (
            one is None
            or delegator is None
            or (role not in TOP_ROLES and role not in delegator.signed.delegations.roles)
        ):
            continue
        delegated = delegator.signed.get_delegated_role(role)
        roles.append(
            RoleView(
                role=role,
                version=one.signed.version,
                keys=delegated.keyids,
                threshold=delegated.threshold,
                online=len(held & set(delegated.keyids)) >= delegated.threshold,
                expires_at=one.signed.expires,
            )
        )
    waiting = [_proposal(session, fleet_id, found, one) for one in service.waiting(session, fleet_id)]
    root = repository.proposal(session, fleet_id, "root")
    if root is not None:
        waiting.insert(0, _root_proposal(found.root, tuf.read(root)))
    return TrustView(roles=roles, waiting=waiting)


def _root_proposal(current: AnyMetadata, proposed: AnyMetadata) -> ProposalView:
    signed = tuf.signers_of(current, "root", proposed) | tuf.signers_of(proposed, "root", proposed)
    keys = dict.fromkeys([*current.signed.roles["root"].keyids, *proposed.signed.roles["root"].keyids])
    return ProposalView(
        role="root",
        keys=list(keys),
        threshold=proposed.signed.roles["root"].threshold,
        signed_by=sorted(signed),
        body=proposed.to_bytes().decode(),
        manifests=[],
    )


def _proposal(session: Session, fleet_id: str, found: service.State, one: service.Waiting) -> ProposalView:
    delegated = one.delegator.signed.get_delegated_role(one.role)
    return ProposalView(
        role=one.role,
        keys=delegated.keyids,
        threshold=delegated.threshold,
        signed_by=sorted(tuf.signers_of(one.delegator, one.role, one.proposed)),
        body=one.proposed.to_bytes().decode(),
        manifests=[] if one.role == "targets" else _manifests(session, fleet_id, _vouched(found, one.role), one),
    )


def _vouched(found: service.State, role: str) -> AnyMetadata | None:
    """A delegated role that verifies from the present root: what it lists, a signer need not be shown again."""
    current = found.delegated.get(role)
    if current is None or found.targets is None or not tuf.enough(found.root, "targets", found.targets):
        return None
    return current if tuf.enough(found.targets, role, current) else None


def _manifests(
    session: Session, fleet_id: str, current: AnyMetadata | None, one: service.Waiting
) -> list[WaitingManifest]:
    before = {path: file.hashes["sha256"] for path, file in current.signed.targets.items()} if current else {}
    wanted = {
        target.path: target.manifest for target in repository.targets(session, fleet_id) if target.role == one.role
    }
    shown = []
    for path, manifest in wanted.items():
        if before.get(path) != hashlib.sha256(manifest).hexdigest():
            change = "replace" if path in before else "add"
            shown.append(
                WaitingManifest.model_validate({"path": path, "change": change, "manifest": manifest.decode()})
            )
    shown += [WaitingManifest(path=path, change="remove", manifest=None) for path in sorted(set(before) - set(wanted))]
    return shown
