"""TUF metadata of a fleet: pure. What it must say, whether signatures suffice, and what a change would change.

Keys of four kinds: root, targets, snapshot, timestamp. The targets' keys also sign the delegated roles, one a model
(`model.NAME`, for `NAME/*/*`), one for candidates that are only to be measured (`trials`, for `trials/*`), and, where
there is one, one for orders to devices without a server (`bundles`, for `bundles/*`), and one for releases of the agent
(`agent-releases`, for `@agent-releases/*/*`). A
manifest is a target; the artifact is signed through the digest in it.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from securesystemslib.signer import Key, Signer
from tuf.api.exceptions import RepositoryError, UnsignedMetadataError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from agent.protocol.manifest import SIGNED_AT
from agent.protocol.release import RELEASES
from fleet_server.errors import InvalidError

AnyMetadata: TypeAlias = Metadata[Any]
TOP_ROLES = ("root", "targets", "snapshot", "timestamp")
TRIALS = "trials"
BUNDLES = "bundles"
AGENT_RELEASES = "agent-releases"
MODEL_PREFIX = "model."
DAY = dt.timedelta(days=1)
VALIDITY = {"root": 365 * DAY, "targets": 365 * DAY, "snapshot": 14 * DAY, "timestamp": 7 * DAY}
RENEW = {"root": 60 * DAY, "targets": 60 * DAY, "snapshot": 7 * DAY, "timestamp": 4 * DAY}  # this long before the end


def model_role(model: str) -> str:
    """The role that signs a model's manifests."""
    return f"{MODEL_PREFIX}{model}"


def is_delegated(role: str) -> bool:
    """Whether a role is one that targets delegates to."""
    return role in {TRIALS, BUNDLES, AGENT_RELEASES} or role.startswith(MODEL_PREFIX)


def read(body: bytes) -> AnyMetadata:
    """Metadata of bytes.

    Raises:
        InvalidError: when they are none.
    """
    try:
        return Metadata.from_bytes(body)
    except (RepositoryError, ValueError, KeyError, TypeError) as error:
        raise InvalidError("bad_metadata", f"body: this is not TUF metadata: {error}", field="body") from None


def new_root(keys: Mapping[str, Sequence[Key]], thresholds: Mapping[str, int], now: dt.datetime) -> AnyMetadata:
    """The first root."""
    root = Root(consistent_snapshot=True, expires=expiry("root", now))
    _set_keys(root, keys, thresholds)
    return Metadata(root)


def next_root(
    current: AnyMetadata, keys: Mapping[str, Sequence[Key]], thresholds: Mapping[str, int], now: dt.datetime
) -> AnyMetadata:
    """The root after another, with other keys for the roles that are named."""
    found: AnyMetadata = Metadata.from_bytes(current.to_bytes())
    found.signatures.clear()
    found.signed.version += 1
    found.signed.expires = expiry("root", now)
    _set_keys(found.signed, keys, thresholds)
    return found


def _set_keys(root: Root, keys: Mapping[str, Sequence[Key]], thresholds: Mapping[str, int]) -> None:
    for role, given in keys.items():
        for keyid in list(root.roles[role].keyids):
            root.revoke_key(keyid, role)
        for key in given:
            root.add_key(key, role)
        root.roles[role].threshold = thresholds.get(role, 1)


def keys_of(root: AnyMetadata, role: str) -> list[Key]:
    """The keys of a top-level role."""
    return [root.signed.keys[keyid] for keyid in root.signed.roles[role].keyids]


def next_targets(
    root: AnyMetadata,
    current: AnyMetadata | None,
    models: Iterable[str],
    now: dt.datetime,
    *,
    bundles: bool = False,
    releases: bool = False,
) -> Metadata:  # type: ignore[type-arg]
    """The top-level targets: no target of its own, one delegation a model, one for trials, and those that there are.

    Args:
        root: whose keys sign.
        current: what is published.
        models: that have manifests.
        now: the time.
        bundles: whether there are orders to devices without a server.
        releases: whether there are releases of the agent.
    """
    keys = keys_of(root, "targets")
    patterns = {TRIALS: "trials/*"} | {model_role(one): f"{one}/*/*" for one in sorted(models)}
    if bundles:
        patterns[BUNDLES] = f"{BUNDLES}/*"
    if releases:
        patterns[AGENT_RELEASES] = f"{RELEASES}/*/*"
    threshold = root.signed.roles["targets"].threshold
    roles = {
        name: DelegatedRole(name, [key.keyid for key in keys], threshold, terminating=True, paths=[pattern])
        for name, pattern in patterns.items()
    }
    targets = Targets(
        version=current.signed.version + 1 if current else 1,
        expires=expiry("targets", now),
        delegations=Delegations({key.keyid: key for key in keys}, roles),
    )
    return Metadata(targets)


def next_delegated(current: AnyMetadata | None, manifests: Mapping[str, bytes], now: dt.datetime) -> AnyMetadata:
    """A delegated role that lists these manifests, by target path."""
    targets = {
        path: TargetFile(len(body), {"sha256": hashlib.sha256(body).hexdigest()}, path)
        for path, body in sorted(manifests.items())
    }
    version = current.signed.version + 1 if current else 1
    return Metadata(Targets(version=version, expires=expiry("targets", now), targets=targets))


def next_snapshot(current: AnyMetadata | None, versions: Mapping[str, int], now: dt.datetime) -> AnyMetadata:
    """The snapshot of these versions of targets and delegated roles."""
    meta = {f"{role}.json": MetaFile(version) for role, version in versions.items()}
    return Metadata(
        Snapshot(version=current.signed.version + 1 if current else 1, expires=expiry("snapshot", now), meta=meta)
    )


def next_timestamp(current: AnyMetadata | None, snapshot_version: int, now: dt.datetime) -> AnyMetadata:
    """The timestamp of a snapshot. It also says when it was made: a device whose clock is behind learns by that."""
    return Metadata(
        Timestamp(
            version=current.signed.version + 1 if current else 1,
            expires=expiry("timestamp", now),
            snapshot_meta=MetaFile(snapshot_version),
            unrecognized_fields={SIGNED_AT: int(now.timestamp())},
        )
    )


def expiry(role: str, now: dt.datetime) -> dt.datetime:
    """When metadata of a role that is made now expires."""
    return now.replace(microsecond=0) + VALIDITY.get(role, VALIDITY["targets"])


def is_due(role: str, metadata: AnyMetadata, now: dt.datetime) -> bool:
    """Whether it is time to sign anew, because of the expiry alone."""
    left: dt.timedelta = metadata.signed.expires - now
    return left < RENEW.get(role, RENEW["targets"])


def sign(metadata: AnyMetadata, signers: Iterable[Signer]) -> None:
    """Add signatures."""
    for signer in signers:
        metadata.sign(signer, append=True)


def enough(delegator: AnyMetadata, role: str, metadata: AnyMetadata) -> bool:
    """Whether the signatures reach the threshold that the delegator sets."""
    try:
        delegator.verify_delegate(role, metadata)
    except (UnsignedMetadataError, ValueError):
        return False
    return True


def signers_of(delegator: AnyMetadata, role: str, metadata: AnyMetadata) -> set[str]:
    """Ids of the role's keys whose signature is valid."""
    try:
        result = delegator.signed.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
    except ValueError:
        return set()
    return set(result.signed)


def same_content(one: AnyMetadata, other: AnyMetadata) -> bool:
    """Whether two say the same, but for version and expiry."""
    left, right = one.signed.to_dict(), other.signed.to_dict()
    for found in (left, right):
        found.pop("version")
        found.pop("expires")
    return bool(left == right)


def merge_signatures(into: AnyMetadata, other: AnyMetadata, valid: Iterable[str]) -> None:
    """Take over another's signatures of the same bytes, those of the named keys."""
    for keyid in valid:
        into.signatures[keyid] = other.signatures[keyid]
