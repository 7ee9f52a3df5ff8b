"""Changing the root: new keys for a role, and the next root with the signatures of the old keys and of the new."""

from __future__ import annotations

import datetime as dt

from securesystemslib.signer import Key
from sqlalchemy.orm import Session
from tuf.api.metadata import Root

from fleet_server import audit
from fleet_server.clock import utc_now
from fleet_server.errors import ConflictError, InvalidError
from fleet_server.principals import Who
from fleet_server.settings import Settings
from fleet_server.trust import metadata as tuf
from fleet_server.trust import repository
from fleet_server.trust.metadata import AnyMetadata
from fleet_server.trust.service import advance, ensure, held_signers, key_folder

LONGEST_ROOT = dt.timedelta(days=730)


def make_key(session: Session, settings: Settings, fleet_id: str, role: str, *, actor: Who) -> Key:
    """A new key for a role that this server signs for; it counts once a root names it.

    Raises:
        ConflictError: when the keys of the role lie elsewhere.
    """
    found = ensure(session, settings, fleet_id)
    folder = key_folder(settings, fleet_id)
    if role in {"root", "targets"} and not held_signers(found.root, role, folder.load()):
        detail = f"the {role} keys are not on this server: make the new one where they are (--new-keys)"
        raise ConflictError("offline_role", detail)
    key = folder.make().public_key
    audit.record(
        session, fleet_id=fleet_id, actor=actor, action="trust.key", subject=f"trust/{role}", detail={"key": key.keyid}
    )
    return key


def accept_root(session: Session, settings: Settings, fleet_id: str, body: bytes, *, actor: Who) -> bool:
    """Take a signed root; whether it has enough signatures, of the old keys and of the new, and is published.

    Keys of either that lie on this server sign by themselves; those that no root needs any more are thrown away.

    Raises:
        InvalidError: when it is no root, or nobody who may has signed it.
        ConflictError: when it does not follow the present one, or names online keys that this server has not.
    """
    current = ensure(session, settings, fleet_id).root
    folder = key_folder(settings, fleet_id)
    signers = folder.load()
    wanted = _read_root(body, current)
    for role in ("snapshot", "timestamp"):
        if len(held_signers(wanted, role, signers)) < wanted.signed.roles[role].threshold:
            detail = f"the {role} key of this root is not on the server: make it with `shoal trust rotate {role}`"
            raise ConflictError("online_key", detail)
    for delegator in (current, wanted):
        tuf.sign(wanted, held_signers(delegator, "root", signers))
    kept = repository.proposal(session, fleet_id, "root")
    if kept is not None and tuf.read(kept).signed_bytes == wanted.signed_bytes:
        tuf.merge_signatures(wanted, tuf.read(kept), tuf.read(kept).signatures)
    valid = tuf.signers_of(current, "root", wanted) | tuf.signers_of(wanted, "root", wanted)
    if not valid:
        raise InvalidError("bad_signature", "body: no root key has signed it", field="body")
    for keyid in set(wanted.signatures) - valid:
        del wanted.signatures[keyid]
    subject = f"trust/root/{wanted.signed.version}"
    audit.record(
        session, fleet_id=fleet_id, actor=actor, action="trust.sign", subject=subject, detail={"keys": sorted(valid)}
    )
    if not (tuf.enough(current, "root", wanted) and tuf.enough(wanted, "root", wanted)):
        repository.keep_proposal(session, fleet_id, "root", wanted.to_bytes())
        return False
    repository.add_metadata(session, fleet_id, "root", wanted.signed.version, wanted.to_bytes())
    advance(session, settings, fleet_id)
    for keyid in set(current.signed.keys) - set(wanted.signed.keys):
        folder.remove(keyid)
    return True


def _read_root(body: bytes, current: AnyMetadata) -> AnyMetadata:
    wanted = tuf.read(body)
    if not isinstance(wanted.signed, Root):
        raise InvalidError("bad_metadata", "body: this is not root metadata", field="body")
    if wanted.signed.version != current.signed.version + 1:
        detail = f"the present root is version {current.signed.version}, this one {wanted.signed.version}: sign again"
        raise ConflictError("root_version", detail)
    if wanted.signed.expires > utc_now() + LONGEST_ROOT:
        raise InvalidError("bad_metadata", "body: a root may last two years at most", field="body")
    return wanted


def replace_online_keys(session: Session, settings: Settings, fleet_id: str, *, actor: Who) -> bool:
    """Replace the keys of snapshot and timestamp, so that clients take versions that begin anew.

    Returns:
        Whether it could: the root's keys lie on this server, and are enough.
    """
    current = ensure(session, settings, fleet_id).root
    folder = key_folder(settings, fleet_id)
    held = held_signers(current, "root", folder.load())
    if len(held) < current.signed.roles["root"].threshold:
        return False
    made = {role: folder.make() for role in ("snapshot", "timestamp")}
    wanted = tuf.next_root(current, {role: [one.public_key] for role, one in made.items()}, {}, utc_now())
    tuf.sign(wanted, held)
    subject = f"trust/root/{wanted.signed.version}"
    audit.record(session, fleet_id=fleet_id, actor=actor, action="trust.replace", subject=subject)
    repository.add_metadata(session, fleet_id, "root", wanted.signed.version, wanted.to_bytes())
    advance(session, settings, fleet_id)
    for keyid in set(current.signed.keys) - set(wanted.signed.keys):
        folder.remove(keyid)
    return True
