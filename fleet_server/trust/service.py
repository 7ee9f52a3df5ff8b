"""Rules of the fleet's TUF repository: what is wanted, what is signed, what waits. Works in its caller's transaction.

The server signs with the keys that lie in its folder, and only those. Where the keys of root and targets are elsewhere,
metadata waits as a proposal until enough signatures have come; then it is published with a new snapshot and timestamp.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from securesystemslib.signer import Signer
from sqlalchemy.orm import Session

from agent.protocol.bundle import BundleOrder, read_order
from agent.protocol.manifest import Manifest, manifest_bytes
from agent.protocol.release import ReleaseManifest
from fleet_server import audit
from fleet_server.clock import utc_now
from fleet_server.errors import ConflictError, InvalidError, UnavailableError
from fleet_server.models import TrustTarget
from fleet_server.principals import Who
from fleet_server.settings import Settings
from fleet_server.trust import metadata as tuf
from fleet_server.trust import repository
from fleet_server.trust.keys import KeyFolder
from fleet_server.trust.metadata import AGENT_RELEASES, BUNDLES, TOP_ROLES, TRIALS, AnyMetadata, model_role

log = logging.getLogger(__name__)
ONLINE_NOTE = (
    "fleet %r: this server made its own signing keys in %s. INSECURE for more than a trial: root and targets keys lie "
    "on a machine that is online, so whoever takes it over can sign models. Move them off with `shoal trust init`"
)


@dataclass(frozen=True)
class State:
    """Published metadata of a fleet, read."""

    root: AnyMetadata
    targets: AnyMetadata | None
    delegated: dict[str, AnyMetadata]
    snapshot: AnyMetadata | None
    timestamp: AnyMetadata | None


@dataclass(frozen=True)
class Waiting:
    """Metadata that waits for signatures, and the role that it must be signed for."""

    role: str
    delegator: AnyMetadata
    proposed: AnyMetadata


def key_folder(settings: Settings, fleet_id: str) -> KeyFolder:
    """Where this server's keys for a fleet lie."""
    return KeyFolder(settings.effective_trust_keys / fleet_id)


def state(session: Session, fleet_id: str) -> State | None:
    """What is published; None when the fleet has no repository yet."""
    found = {role: tuf.read(body) for role, body in repository.latest(session, fleet_id).items()}
    if "root" not in found:
        return None
    delegated = {role: one for role, one in found.items() if role not in TOP_ROLES}
    return State(found["root"], found.get("targets"), delegated, found.get("snapshot"), found.get("timestamp"))


def ensure(session: Session, settings: Settings, fleet_id: str) -> State:
    """The fleet's repository; where there is none it is made, with keys of this server's own for every role."""
    repository.lock(session, fleet_id)
    found = state(session, fleet_id)
    if found is not None:
        return found
    folder = key_folder(settings, fleet_id)
    signers = {role: folder.make() for role in TOP_ROLES}
    root = tuf.new_root({role: [one.public_key] for role, one in signers.items()}, {}, utc_now())
    tuf.sign(root, [signers["root"]])
    repository.add_metadata(session, fleet_id, "root", 1, root.to_bytes())
    log.warning(ONLINE_NOTE, fleet_id, folder.path)
    audit.record(session, fleet_id=fleet_id, actor="server", action="trust.create", subject="trust/root")
    return advance(session, settings, fleet_id)


def want(session: Session, fleet_id: str, manifest: Manifest, *, trial: bool = False) -> str:
    """Let a manifest be signed; returns its target path. The same manifest keeps the bytes that it was signed with."""
    path = manifest.trial_path if trial else manifest.target_path
    role = TRIALS if trial else model_role(manifest.model)
    found = repository.target(session, fleet_id, path)
    if found is None:
        session.add(TrustTarget(fleet_id=fleet_id, path=path, role=role, manifest=manifest_bytes(manifest)))
    elif msgspec.json.decode(found.manifest, type=Manifest) != manifest:
        found.manifest = manifest_bytes(manifest)
    session.flush()
    return path


def want_release(session: Session, fleet_id: str, manifest: ReleaseManifest) -> None:
    """Let a bundle of a release of the agent be signed."""
    body = msgspec.json.encode(manifest)
    session.add(TrustTarget(fleet_id=fleet_id, path=manifest.target_path, role=AGENT_RELEASES, manifest=body))
    session.flush()


def forget_release(session: Session, fleet_id: str, manifest: ReleaseManifest) -> None:
    """A bundle is gone: its manifest leaves the metadata with the next signature."""
    found = repository.target(session, fleet_id, manifest.target_path)
    if found is not None:
        session.delete(found)
        session.flush()


def signs(session: Session, found: State, fleet_id: str, path: str) -> bool:
    """Whether published metadata vouches for a target."""
    target = repository.target(session, fleet_id, path)
    return target is not None and is_signed(found, target)


def want_order(session: Session, fleet_id: str, name: str, targets: Sequence[str], probation_s: float) -> BundleOrder:
    """Let an order be signed, in the place of an earlier one of its name; one that says the same stays as it was."""
    wanted = BundleOrder(name, 1, tuple(sorted(targets)), probation_s)
    found = repository.target(session, fleet_id, wanted.target_path)
    if found is None:
        body = msgspec.json.encode(wanted)
        session.add(TrustTarget(fleet_id=fleet_id, path=wanted.target_path, role=BUNDLES, manifest=body))
    else:
        before = read_order(found.manifest)
        wanted = msgspec.structs.replace(wanted, serial=before.serial)
        if wanted != before:
            wanted = msgspec.structs.replace(wanted, serial=before.serial + 1)
            found.manifest = msgspec.json.encode(wanted)
    session.flush()
    return wanted


def sign_waiting(session: Session, settings: Settings, fleet_id: str, path: str) -> bool:
    """Whether a target is signed; it is at once, where the keys lie on this server."""
    found = ensure(session, settings, fleet_id)
    if _unsigned(session, fleet_id, found, [path]):
        found = advance(session, settings, fleet_id)
    return not _unsigned(session, fleet_id, found, [path])


def signs_by_itself(session: Session, settings: Settings, fleet_id: str) -> bool:
    """Whether the keys of targets lie on this server, so that nobody is asked for a signature."""
    root = ensure(session, settings, fleet_id).root
    held = held_signers(root, "targets", key_folder(settings, fleet_id).load())
    return len(held) >= int(root.signed.roles["targets"].threshold)


def chain(session: Session, fleet_id: str, roles: Sequence[str]) -> dict[str, bytes]:
    """What a client that trusts any root of the fleet needs to judge targets of these delegated roles, by file name."""
    found = state(session, fleet_id)
    assert found is not None
    files = {}
    for version in range(1, found.root.signed.version + 1):
        files[f"{version}.root.json"] = repository.metadata(session, fleet_id, "root", version)
    files["timestamp.json"] = repository.metadata(session, fleet_id, "timestamp", None)
    for role in ("snapshot", "targets", *roles):
        body = repository.metadata(session, fleet_id, role, None)
        if body is not None:
            files[f"{tuf.read(body).signed.version}.{role}.json"] = body
    return {name: body for name, body in files.items() if body is not None}


def want_trials(session: Session, fleet_id: str, variant_id: str, manifests: Sequence[Manifest]) -> list[str]:
    """Let the manifests of a variant's candidates be signed, and those of earlier builds no longer."""
    keep = {one.trial_path for one in manifests} | {one.target_path for one in manifests}
    repository.delete_targets(session, fleet_id, variant_id, keep=frozenset(keep))
    return [want(session, fleet_id, one, trial=True) for one in manifests]


def forget(session: Session, fleet_id: str, variant_ids: Sequence[str]) -> None:
    """Variants are gone: their manifests leave the metadata with the next signature."""
    for one in variant_ids:
        repository.delete_targets(session, fleet_id, one)


def manifest_as_signed(session: Session, fleet_id: str, path: str) -> bytes | None:
    """The bytes of a manifest that is to be signed, or is."""
    found = repository.target(session, fleet_id, path)
    return found.manifest if found else None


def require_signed(session: Session, settings: Settings, fleet_id: str, paths: Sequence[str], reference: str) -> None:
    """Make sure that manifests are signed; they are at once, where the keys lie on this server.

    Raises:
        ConflictError: when some wait for a signature.
    """
    found = ensure(session, settings, fleet_id)
    if _unsigned(session, fleet_id, found, paths):
        found = advance(session, settings, fleet_id)
    waiting = _unsigned(session, fleet_id, found, paths)
    if waiting:
        raise ConflictError(
            "unsigned",
            f"{len(waiting)} of {len(paths)} manifests of {reference} wait for a signature, and devices refuse what "
            "nobody has signed: sign with `shoal trust sign --keys …`",
        )


def _unsigned(session: Session, fleet_id: str, found: State, paths: Sequence[str]) -> list[str]:
    waiting = []
    for path in paths:
        target = repository.target(session, fleet_id, path)
        if target is None or not is_signed(found, target):
            waiting.append(path)
    return waiting


def is_signed(found: State, target: TrustTarget) -> bool:
    """Whether published metadata vouches for a manifest."""
    role = found.delegated.get(target.role)
    if role is None or found.targets is None or target.path not in role.signed.targets:
        return False
    listed: str = role.signed.targets[target.path].hashes["sha256"]
    vouched = tuf.enough(found.root, "targets", found.targets) and tuf.enough(found.targets, target.role, role)
    return vouched and listed == hashlib.sha256(target.manifest).hexdigest() and not role.signed.is_expired()


def waiting(session: Session, fleet_id: str) -> list[Waiting]:
    """What ought to be published and is not: other content, too few signatures, or it expires soon. It is kept."""
    found = state(session, fleet_id)
    if found is None:
        return []
    now = utc_now()
    by_role: dict[str, dict[str, bytes]] = {}
    for target in repository.targets(session, fleet_id):
        by_role.setdefault(target.role, {})[target.path] = target.manifest
    roles = {*by_role, *found.delegated}
    models = {role.removeprefix(tuf.MODEL_PREFIX) for role in roles if role.startswith(tuf.MODEL_PREFIX)}
    open_ones = []
    wanted = tuf.next_targets(
        found.root, found.targets, models, now, bundles=BUNDLES in roles, releases=AGENT_RELEASES in roles
    )
    targets = _open(session, fleet_id, "targets", found.root, found.targets, wanted, now)
    if targets is not None:
        open_ones.append(Waiting("targets", found.root, targets))
    elif found.targets is not None:
        targets = found.targets
    assert targets is not None
    for role in targets.signed.delegations.roles:
        current = found.delegated.get(role)
        wanted = tuf.next_delegated(current, by_role.get(role, {}), now)
        proposed = _open(session, fleet_id, role, targets, current, wanted, now)
        if proposed is not None:
            open_ones.append(Waiting(role, targets, proposed))
    return open_ones


def _open(
    session: Session,
    fleet_id: str,
    role: str,
    delegator: AnyMetadata,
    current: AnyMetadata | None,
    wanted: AnyMetadata,
    now: dt.datetime,
) -> AnyMetadata | None:
    """The proposal for a role, the kept one where it still says the same; None when what is published is right."""
    right = current is not None and tuf.same_content(current, wanted) and tuf.enough(delegator, role, current)
    if right and current is not None and not tuf.is_due(role, current, now):
        repository.drop_proposal(session, fleet_id, role)
        return None
    kept = repository.proposal(session, fleet_id, role)
    if kept is not None:
        proposed = tuf.read(kept)
        fits = proposed.signed.version == wanted.signed.version and tuf.same_content(proposed, wanted)
        if fits and not tuf.is_due(role, proposed, now):
            return proposed
    repository.keep_proposal(session, fleet_id, role, wanted.to_bytes())
    return wanted


def advance(session: Session, settings: Settings, fleet_id: str) -> State:
    """Sign what this server has the keys for, and publish what has enough signatures.

    Raises:
        UnavailableError: when the keys of snapshot or timestamp are not here.
    """
    repository.lock(session, fleet_id)
    signers = key_folder(settings, fleet_id).load()
    _renew_root(session, fleet_id, signers)
    moved = True
    while moved:
        moved = False
        for one in waiting(session, fleet_id):
            tuf.sign(one.proposed, held_signers(one.delegator, one.role, signers))
            if _publish_if_complete(session, fleet_id, one):
                moved = True
    return _seal(session, fleet_id, signers)


def held_signers(delegator: AnyMetadata, role: str, signers: dict[str, Signer]) -> list[Signer]:
    """The keys of a role that are here."""
    return [signers[keyid] for keyid in delegator.signed.get_delegated_role(role).keyids if keyid in signers]


def _publish_if_complete(session: Session, fleet_id: str, one: Waiting) -> bool:
    """Publish what the *published* delegator vouches for; what only a proposal would vouch for waits for that."""
    published = state(session, fleet_id)
    assert published is not None
    delegator = published.root if one.role == "targets" else published.targets
    known = delegator is not None and (one.role == "targets" or one.role in delegator.signed.delegations.roles)
    if delegator is None or not known or not tuf.enough(delegator, one.role, one.proposed):
        repository.keep_proposal(session, fleet_id, one.role, one.proposed.to_bytes())
        return False
    repository.add_metadata(session, fleet_id, one.role, one.proposed.signed.version, one.proposed.to_bytes())
    return True


def _renew_root(session: Session, fleet_id: str, signers: dict[str, Signer]) -> None:
    found = state(session, fleet_id)
    assert found is not None
    now = utc_now()
    held = held_signers(found.root, "root", signers)
    if held and tuf.is_due("root", found.root, now):
        root = tuf.next_root(found.root, {}, {}, now)
        tuf.sign(root, held)
        if tuf.enough(found.root, "root", root):
            repository.add_metadata(session, fleet_id, "root", root.signed.version, root.to_bytes())


def _seal(session: Session, fleet_id: str, signers: dict[str, Signer]) -> State:
    """Bring snapshot and timestamp to what is published."""
    found = state(session, fleet_id)
    assert found is not None
    now = utc_now()
    if found.targets is None:
        return found
    versions = {role: one.signed.version for role, one in {"targets": found.targets, **found.delegated}.items()}
    snapshot = tuf.next_snapshot(found.snapshot, versions, now)
    if _stale(found.root, "snapshot", found.snapshot, snapshot, now):
        _sign_online(session, fleet_id, found.root, "snapshot", snapshot, signers)
    else:
        assert found.snapshot is not None
        snapshot = found.snapshot
    timestamp = tuf.next_timestamp(found.timestamp, snapshot.signed.version, now)
    moved = found.timestamp is None or found.timestamp.signed.snapshot_meta != timestamp.signed.snapshot_meta
    right = found.timestamp is not None and tuf.enough(found.root, "timestamp", found.timestamp)
    if moved or not right or (found.timestamp is not None and tuf.is_due("timestamp", found.timestamp, now)):
        _sign_online(session, fleet_id, found.root, "timestamp", timestamp, signers)
    sealed = state(session, fleet_id)
    assert sealed is not None
    return sealed


def _stale(root: AnyMetadata, role: str, current: AnyMetadata | None, wanted: AnyMetadata, now: dt.datetime) -> bool:
    if current is None or not tuf.same_content(current, wanted):
        return True
    return not tuf.enough(root, role, current) or tuf.is_due(role, current, now)


def _sign_online(
    session: Session, fleet_id: str, root: AnyMetadata, role: str, made: AnyMetadata, signers: dict[str, Signer]
) -> None:
    tuf.sign(made, held_signers(root, role, signers))
    if not tuf.enough(root, role, made):
        raise UnavailableError(
            "trust_keys",
            f"the {role} key is not on this server: put its file back into SHOAL_TRUST_KEYS, or replace it with "
            f"`shoal trust rotate {role}`",
        )
    repository.add_metadata(session, fleet_id, role, made.signed.version, made.to_bytes())


def accept(session: Session, settings: Settings, fleet_id: str, role: str, body: bytes, *, actor: Who) -> bool:
    """Take signatures of a proposal; whether it has enough, and is published.

    Raises:
        InvalidError: when no key of the role has signed it.
        ConflictError: when nothing of the role waits, or what waits is not this.
    """
    ensure(session, settings, fleet_id)
    one = next((found for found in waiting(session, fleet_id) if found.role == role), None)
    signed = tuf.read(body)
    if one is None or one.proposed.signed_bytes != signed.signed_bytes:
        raise ConflictError(
            "proposal_changed", f"what waits of {role!r} is not what was signed, it changed meanwhile: sign again"
        )
    valid = tuf.signers_of(one.delegator, role, signed)
    if not valid:
        raise InvalidError("bad_signature", f"body: no key of {role!r} has signed it", field="body")
    tuf.merge_signatures(one.proposed, signed, valid)
    audit.record(
        session,
        fleet_id=fleet_id,
        actor=actor,
        action="trust.sign",
        subject=f"trust/{role}/{signed.signed.version}",
        detail={"keys": sorted(valid)},
    )
    repository.keep_proposal(session, fleet_id, role, one.proposed.to_bytes())
    published = tuf.enough(one.delegator, role, one.proposed)
    advance(session, settings, fleet_id)
    return published


def metadata_file(session: Session, fleet_id: str, file: str) -> bytes | None:
    """A metadata file by the name that TUF clients ask for: `timestamp.json`, `3.root.json`, `7.model.mnist.json`."""
    name = file.removesuffix(".json")
    if name in TOP_ROLES:
        return repository.metadata(session, fleet_id, name, None)
    version, _, role = name.partition(".")
    if not role or not version.isascii() or not version.isdigit() or len(version) > 9:
        return None
    return repository.metadata(session, fleet_id, role, int(version))
