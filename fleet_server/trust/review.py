"""What a signer checks before signing, on a machine of their own: pure. The server is not believed.

A signer starts from a root of their own and follows the chain of roots from there. Whatever a proposal adds must have
been shown; whatever it keeps must be in metadata that verifies from that root.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Root, Targets

from agent.protocol.bundle import BundleOrder, read_order
from agent.protocol.codec import check_manifest, check_release
from agent.protocol.errors import WireError
from agent.protocol.manifest import Manifest
from agent.protocol.release import RELEASES, ReleaseManifest
from fleet_server.errors import InvalidError
from fleet_server.trust import metadata as tuf
from fleet_server.trust.metadata import AGENT_RELEASES, BUNDLES, TRIALS, AnyMetadata, model_role

Signed = Manifest | BundleOrder | ReleaseManifest
PATTERNS = {TRIALS: f"{TRIALS}/*", BUNDLES: f"{BUNDLES}/*", AGENT_RELEASES: f"{RELEASES}/*/*"}


@dataclass(frozen=True)
class Change:
    """One target of a proposal: `add`, `replace` or `remove`; what is signed is there but for one that goes."""

    path: str
    change: str
    manifest: Signed | None


def follow(own: bytes, later: Iterable[bytes]) -> AnyMetadata:
    """The newest root of a chain that begins with one's own.

    Raises:
        InvalidError: when a root is not signed by the keys of the one before it and by its own.
    """
    root = tuf.read(own)
    _verify(root, root)
    for body in later:
        following = tuf.read(body)
        _verify(root, following)
        _verify(following, following)
        if following.signed.version != root.signed.version + 1:
            raise _refusal(f"root {following.signed.version} does not follow root {root.signed.version}")
        root = following
    return root


def _verify(delegator: AnyMetadata, root: AnyMetadata) -> None:
    try:
        if not isinstance(delegator.signed, Root) or not isinstance(root.signed, Root):
            raise _refusal("what is said to be a root is none")
        delegator.verify_delegate("root", root)
    except (RepositoryError, ValueError) as error:
        raise _refusal(f"root {root.signed.version} is not signed by whom it must be: {error}") from None


def check_targets(root: AnyMetadata, proposed: AnyMetadata) -> list[str]:
    """The models that a proposal of the top-level targets delegates to.

    Raises:
        InvalidError: when it says anything else than one delegation a model, one for trials, one for bundles and one
            for releases of the agent, to the keys of targets.
    """
    signed = proposed.signed
    if not isinstance(signed, Targets) or signed.targets or signed.delegations is None or not signed.delegations.roles:
        raise _refusal("targets does not hold delegations alone")
    expected = root.signed.roles["targets"]
    models = []
    for name, role in signed.delegations.roles.items():
        model = name.removeprefix(tuf.MODEL_PREFIX)
        pattern = PATTERNS.get(name, f"{model}/*/*")
        if set(role.keyids) != set(expected.keyids) or role.threshold != expected.threshold:
            raise _refusal(f"{name} would be signed by other keys than targets is")
        if not tuf.is_delegated(name) or role.paths != [pattern] or not role.terminating:
            raise _refusal(f"{name} would be for {role.paths}")
        if name not in PATTERNS:
            models.append(model)
    for keyid, key in signed.delegations.keys.items():
        if root.signed.keys.get(keyid) != key:
            raise _refusal(f"key {keyid[:12]} is not the one that the root names")
    return models


def check_delegated(
    role: str, published: AnyMetadata | None, proposed: AnyMetadata, shown: Mapping[str, bytes]
) -> list[Change]:
    """What a proposal of a delegated role changes.

    Args:
        role: its name.
        published: what is published of it, verified; None when there is nothing, or nothing that verifies.
        proposed: what is to be signed.
        shown: manifests by target path.

    Raises:
        InvalidError: when something would be signed that was not shown, or that is none of this role's.
    """
    if not isinstance(proposed.signed, Targets) or proposed.signed.delegations is not None:
        raise _refusal(f"{role} would delegate further")
    before = {path: file.hashes["sha256"] for path, file in published.signed.targets.items()} if published else {}
    changes = []
    for path, file in proposed.signed.targets.items():
        digest = file.hashes.get("sha256")
        if before.get(path) == digest:
            continue
        body = shown.get(path)
        if body is None or hashlib.sha256(body).hexdigest() != digest or len(body) != file.length:
            raise _refusal(f"{path} would be signed without being shown")
        changes.append(Change(path, "replace" if path in before else "add", _signed(role, path, body)))
    gone = sorted(set(before) - set(proposed.signed.targets))
    return changes + [Change(path, "remove", None) for path in gone]


def _signed(role: str, path: str, body: bytes) -> Signed:
    try:
        if role == AGENT_RELEASES:
            release = check_release(msgspec.json.decode(body, type=ReleaseManifest))
            if path != release.target_path:
                raise _refusal(f"{path} is the release {release.info.version}")
            return release
        if role == BUNDLES:
            order = read_order(body)
            if path != order.target_path:
                raise _refusal(f"{path} is the order {order.name!r}")
            return order
        manifest = check_manifest(msgspec.json.decode(body, type=Manifest))
    except (WireError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _refusal(f"{path} is no {'order' if role == BUNDLES else 'manifest'}: {error}") from None
    fits = path == manifest.trial_path if role == TRIALS else path == manifest.target_path
    if not fits or (role != TRIALS and role != model_role(manifest.model)):
        raise _refusal(f"{path} is the manifest of {manifest.model}@{manifest.version}")
    return manifest


def _refusal(detail: str) -> InvalidError:
    return InvalidError("bad_proposal", f"nothing was signed: {detail}; is this server yours, and unharmed?")
