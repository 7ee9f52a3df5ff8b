"""What a signer refuses to sign, whatever the server proposes."""

from __future__ import annotations

import datetime as dt

import msgspec
import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata

from agent.protocol.bundle import BundleOrder
from agent.protocol.manifest import Manifest
from fleet_server.errors import InvalidError
from fleet_server.trust import metadata as tuf
from fleet_server.trust.review import check_delegated, check_targets, follow
from tests.unit.agent.test_updater import manifest

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
ONE = manifest("a")
BODY = msgspec.json.encode(ONE)


@pytest.fixture
def keys() -> dict[str, CryptoSigner]:
    return {role: CryptoSigner.generate_ed25519() for role in tuf.TOP_ROLES}


@pytest.fixture
def root(keys: dict[str, CryptoSigner]) -> tuf.AnyMetadata:
    found = tuf.new_root({role: [one.public_key] for role, one in keys.items()}, {}, NOW)
    tuf.sign(found, [keys["root"]])
    return found


def test_a_chain_of_roots(root: tuf.AnyMetadata, keys: dict[str, CryptoSigner]) -> None:
    fresh = CryptoSigner.generate_ed25519()
    second = tuf.next_root(root, {"root": [fresh.public_key]}, {}, NOW)
    second.sign(keys["root"], append=True)
    with pytest.raises(InvalidError, match="root 2 is not signed"):
        follow(root.to_bytes(), [second.to_bytes()])
    second.sign(fresh, append=True)
    assert follow(root.to_bytes(), [second.to_bytes()]).signed.version == 2
    stranger = tuf.next_root(root, {"root": [fresh.public_key]}, {}, NOW)
    stranger.sign(fresh)
    with pytest.raises(InvalidError, match="nothing was signed"):
        follow(root.to_bytes(), [stranger.to_bytes()])


def test_delegations_to_other_keys_are_refused(root: tuf.AnyMetadata) -> None:
    good = tuf.next_targets(root, None, ["m"], NOW)
    assert check_targets(root, good) == ["m"]
    stranger = CryptoSigner.generate_ed25519().public_key
    for change in ("keys", "threshold", "paths", "target", "key"):
        bad = Metadata.from_bytes(good.to_bytes())
        role = bad.signed.delegations.roles["model.m"]
        if change == "keys":
            role.keyids.append(stranger.keyid)
        elif change == "threshold":
            role.threshold = 2
        elif change == "paths":
            role.paths = ["*/*/*"]
        elif change == "target":
            bad.signed.targets = tuf.next_delegated(None, {"m/1/v.json": BODY}, NOW).signed.targets
        else:
            bad.signed.delegations.keys[role.keyids[0]] = stranger
        with pytest.raises(InvalidError, match="nothing was signed"):
            check_targets(root, bad)


def test_what_was_not_shown_is_not_signed() -> None:
    proposed = tuf.next_delegated(None, {ONE.target_path: BODY}, NOW)
    (change,) = check_delegated("model.m", None, proposed, {ONE.target_path: BODY})
    assert (change.change, change.manifest) == ("add", ONE)
    for shown in ({}, {ONE.target_path: BODY + b" "}):
        with pytest.raises(InvalidError, match="without being shown"):
            check_delegated("model.m", None, proposed, shown)
    assert check_delegated("model.m", proposed, tuf.next_delegated(proposed, {ONE.target_path: BODY}, NOW), {}) == []
    (gone,) = check_delegated("model.m", proposed, tuf.next_delegated(proposed, {}, NOW), {})
    assert gone.change == "remove"


@pytest.mark.parametrize(
    ("role", "path", "one"),
    [
        ("model.m", ONE.target_path, manifest("a", version="2")),
        ("model.m", "other/1/v.json", manifest("a", model="other")),
        ("trials", ONE.trial_path, manifest("b")),
        ("trials", ONE.target_path, ONE),
    ],
)
def test_a_manifest_under_another_name(role: str, path: str, one: Manifest) -> None:
    body = msgspec.json.encode(one)
    with pytest.raises(InvalidError, match="is the manifest of"):
        check_delegated(role, None, tuf.next_delegated(None, {path: body}, NOW), {path: body})


def test_what_is_no_manifest() -> None:
    proposed = tuf.next_delegated(None, {ONE.target_path: b"{}"}, NOW)
    with pytest.raises(InvalidError, match="no manifest"):
        check_delegated("model.m", None, proposed, {ONE.target_path: b"{}"})


def test_an_order_is_shown_before_it_is_signed(root: tuf.AnyMetadata) -> None:
    targets = tuf.next_targets(root, None, ["m"], NOW, bundles=True)
    assert check_targets(root, targets) == ["m"]
    order = BundleOrder("line-a", 1, (ONE.target_path,))
    body = msgspec.json.encode(order)
    proposed = tuf.next_delegated(None, {order.target_path: body}, NOW)
    (change,) = check_delegated("bundles", None, proposed, {order.target_path: body})
    assert change.manifest == order
    with pytest.raises(InvalidError, match="without being shown"):
        check_delegated("bundles", None, proposed, {})
    for path, content in (("bundles/line-b.json", body), ("bundles/line-a.json", b"{}"), (ONE.target_path, BODY)):
        wrong = tuf.next_delegated(None, {path: content}, NOW)
        with pytest.raises(InvalidError, match="nothing was signed"):
            check_delegated("bundles", None, wrong, {path: content})
    with pytest.raises(InvalidError, match="no manifest"):
        check_delegated("model.m", None, proposed, {order.target_path: body})
