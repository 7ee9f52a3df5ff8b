"""A fleet's TUF repository on real databases: what the server signs by itself, and what a thief can't."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import msgspec
import pytest
from securesystemslib.signer import Signer
from sqlalchemy import select
from tuf.api.metadata import TargetFile

from agent.protocol.errors import WireErrorCode
from agent.protocol.manifest import Manifest
from agent.protocol.messages import TrustPiece
from agent.update.trust import PieceFetcher, TrustClient, TrustError
from fleet_server import migrations
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.errors import ConflictError, InvalidError
from fleet_server.models import AuditEvent, Fleet
from fleet_server.principals import DEFAULT_FLEET as FLEET
from fleet_server.settings import Settings
from fleet_server.trust import metadata as tuf
from fleet_server.trust import repository, roots, service
from fleet_server.trust.keeper import TrustKeeper
from fleet_server.trust.keys import KeyFolder, open_signer
from tests.softhsm import MODULE, PIN, SoftHsm
from tests.unit.agent.test_updater import manifest


class Repository:
    """A server with its keys, an operator with theirs, and a device."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database = database
        self.folder = folder
        self.settings = Settings(state_dir=folder / "server")
        with database.write() as session:
            service.ensure(session, self.settings, FLEET)
        self.first_root = self.file("1.root.json")

    def file(self, name: str) -> bytes:
        with self.database.read() as session:
            found = service.metadata_file(session, FLEET, name)
        assert found is not None
        return found

    def ask(self, name: str, offset: int) -> TrustPiece:
        with self.database.read() as session:
            body = service.metadata_file(session, FLEET, name)
        if body is None:
            return TrustPiece(name, offset, absent=True)
        return TrustPiece(name, offset, len(body), body[offset:])

    def want(self, *manifests: Manifest, trial: bool = False) -> None:
        with self.database.write() as session:
            paths = [service.want(session, FLEET, one, trial=trial) for one in manifests]
        with self.database.write() as session:
            service.require_signed(session, self.settings, FLEET, paths, "m@1")

    def device(self, name: str = "device") -> TrustClient:
        return TrustClient(self.folder / name, self.first_root, PieceFetcher(self.ask))

    def check(self, one: Manifest, *, trial: bool = False) -> None:
        with self.database.read() as session:
            path = one.trial_path if trial else one.target_path
            signed = service.manifest_as_signed(session, FLEET, path)
        device = self.device()
        device.refresh()
        device.check(path, signed or msgspec.json.encode(one))

    def keys(self) -> set[str]:
        return set(service.key_folder(self.settings, FLEET).load())

    def take_offline(self, *operators: Signer, threshold: int = 1) -> None:
        """What `shoal trust init` does: root and targets keys that the server never sees."""
        current = tuf.read(self.file("root.json"))
        keys = {role: [one.public_key for one in operators] for role in ("root", "targets")}
        proposed = tuf.next_root(current, keys, dict.fromkeys(keys, threshold), utc_now())
        tuf.sign(proposed, operators)
        with self.database.write() as session:
            assert roots.accept_root(session, self.settings, FLEET, proposed.to_bytes(), actor="op")
        for one in operators:
            self.sign(one)

    def sign(self, operator: Signer) -> dict[str, bool]:
        """Sign everything that waits; by role, whether it is published."""
        with self.database.write() as session:
            waiting = service.waiting(session, FLEET)
        done = {}
        for one in waiting:
            one.proposed.sign(operator, append=True)
            with self.database.write() as session:
                body = one.proposed.to_bytes()
                done[one.role] = service.accept(session, self.settings, FLEET, one.role, body, actor="op")
        return done


@pytest.fixture
def fleet(database: Database, tmp_path: Path) -> Repository:
    return Repository(database, tmp_path)


@pytest.fixture
def operator(tmp_path: Path) -> Signer:
    return open_signer(str(tmp_path / "operator"), lambda: "")


def test_with_its_own_keys_the_server_signs_at_once(fleet: Repository) -> None:
    one, other = manifest("a"), manifest("b", model="another", version="2")
    fleet.want(one, other)
    fleet.want(manifest("c"), trial=True)
    fleet.check(one)
    fleet.check(other)
    fleet.check(manifest("c"), trial=True)
    folder = service.key_folder(fleet.settings, FLEET).path
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert len(fleet.keys()) == 4


def test_nothing_is_published_where_nothing_changed(fleet: Repository) -> None:
    fleet.want(manifest("a"))
    before = fleet.file("timestamp.json")
    keeper = TrustKeeper(fleet.database, fleet.settings)
    keeper.tick()
    fleet.want(manifest("a"))
    assert fleet.file("timestamp.json") == before
    keeper.stop()


def test_the_keeper_renews_what_expires_soon(fleet: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.want(manifest("a"))
    monkeypatch.setitem(tuf.RENEW, "timestamp", 8 * tuf.DAY)
    monkeypatch.setitem(tuf.RENEW, "root", 366 * tuf.DAY)
    keeper = TrustKeeper(fleet.database, fleet.settings)
    before = tuf.read(fleet.file("timestamp.json")).signed.version
    keeper.tick()
    assert tuf.read(fleet.file("timestamp.json")).signed.version == before + 1
    assert tuf.read(fleet.file("root.json")).signed.version == 2
    monkeypatch.undo()
    fleet.check(manifest("a"))
    keeper.stop()


def test_a_manifest_that_was_removed_is_not_trusted_any_more(fleet: Repository) -> None:
    fleet.want(manifest("a"))
    fleet.check(manifest("a"))
    with fleet.database.write() as session:
        service.forget(session, FLEET, ["v"])
        service.advance(session, fleet.settings, FLEET)
    with pytest.raises(TrustError) as found:
        fleet.check(manifest("a"))
    assert found.value.code is WireErrorCode.UNSIGNED


def test_with_offline_keys_nothing_goes_out_unsigned(fleet: Repository, operator: Signer) -> None:
    fleet.want(manifest("a"))
    fleet.take_offline(operator)
    fleet.check(manifest("a"))
    root = tuf.read(fleet.file("root.json")).signed
    assert fleet.keys() == {*root.roles["snapshot"].keyids, *root.roles["timestamp"].keyids}, "the others are gone"
    with pytest.raises(ConflictError, match="shoal trust sign"):
        fleet.want(manifest("b", model="new"))
    with pytest.raises(ConflictError, match="shoal trust sign"):
        fleet.want(manifest("c"), trial=True)
    with pytest.raises(TrustError) as found:
        fleet.check(manifest("b", model="new"))
    assert found.value.code is WireErrorCode.UNSIGNED
    assert fleet.sign(operator) == {"targets": True, "model.new": True, "trials": True}
    fleet.want(manifest("b", model="new"))
    fleet.check(manifest("b", model="new"))
    fleet.check(manifest("c"), trial=True)
    with fleet.database.read() as session:
        actions = session.scalars(select(AuditEvent.action)).all()
    assert actions.count("trust.sign") >= 4


def test_two_of_two(fleet: Repository, tmp_path: Path, operator: Signer) -> None:
    second = open_signer(str(tmp_path / "second"), lambda: "")
    fleet.take_offline(operator, second, threshold=2)
    with pytest.raises(ConflictError):
        fleet.want(manifest("a"))
    assert not any(fleet.sign(operator).values())
    with pytest.raises(ConflictError):
        fleet.want(manifest("a"))
    assert all(fleet.sign(second).values())
    fleet.want(manifest("a"))
    fleet.check(manifest("a"))


def test_signatures_of_others_and_of_other_content_are_refused(
    fleet: Repository, tmp_path: Path, operator: Signer
) -> None:
    fleet.take_offline(operator)
    with pytest.raises(ConflictError):
        fleet.want(manifest("a"))
    stranger = KeyFolder(tmp_path / "stranger").make()
    with pytest.raises(InvalidError, match="no key"):
        fleet.sign(stranger)
    with fleet.database.write() as session:
        one = service.waiting(session, FLEET)[-1]
        one.proposed.signed.targets["m/9/evil.json"] = TargetFile(1, {"sha256": "0" * 64}, "m/9/evil.json")
        one.proposed.sign(operator)
        with pytest.raises(ConflictError, match="changed meanwhile"):
            service.accept(session, fleet.settings, FLEET, one.role, one.proposed.to_bytes(), actor="x")
        root = tuf.next_root(tuf.read(fleet.first_root), {"root": [stranger.public_key]}, {}, utc_now())
        root.sign(stranger)
        with pytest.raises(ConflictError, match="present root"):
            roots.accept_root(session, fleet.settings, FLEET, root.to_bytes(), actor="x")


@pytest.mark.parametrize("role", ["snapshot", "timestamp", "targets", "root"])
def test_each_key_can_be_replaced(fleet: Repository, tmp_path: Path, operator: Signer, role: str) -> None:
    fleet.want(manifest("a"))
    fleet.take_offline(operator)
    fleet.check(manifest("a"))
    fresh = KeyFolder(tmp_path / "fresh").make()
    with fleet.database.write() as session:
        online = role in {"snapshot", "timestamp"}
        key = roots.make_key(session, fleet.settings, FLEET, role, actor="op") if online else fresh.public_key
        if not online:
            with pytest.raises(ConflictError, match="new-keys"):
                roots.make_key(session, fleet.settings, FLEET, role, actor="op")
    proposed = tuf.next_root(tuf.read(fleet.file("root.json")), {role: [key]}, {}, utc_now())
    tuf.sign(proposed, [operator, *([fresh] if role == "root" else [])])
    with fleet.database.write() as session:
        assert roots.accept_root(session, fleet.settings, FLEET, proposed.to_bytes(), actor="op")
    if role == "targets":
        with pytest.raises(TrustError):
            fleet.check(manifest("a"))
        fleet.sign(fresh)
    fleet.check(manifest("a"))
    assert tuf.read(fleet.file("root.json")).signed.roles[role].keyids == [key.keyid]


def test_a_stolen_server_can_not_make_a_device_run_what_nobody_signed(fleet: Repository, operator: Signer) -> None:
    """The drill: online keys, database and broker are the attacker's; root and targets keys are not."""
    fleet.want(manifest("a"))
    fleet.take_offline(operator)
    device = fleet.device()
    device.refresh()
    device.check(manifest("a").target_path, msgspec.json.encode(manifest("a")))
    evil = manifest("e", version="9")
    body = msgspec.json.encode(evil)
    online = service.key_folder(fleet.settings, FLEET).load()
    assert len(online) == 2

    def publish(role: str, made: tuf.AnyMetadata) -> None:
        with fleet.database.write() as session:
            repository.add_metadata(session, FLEET, role, made.signed.version, made.to_bytes())

    def refused() -> TrustError:
        """Why a device that was never attacked before refuses; the one that is attacked all along does too."""

        def attack(name: str) -> None:
            attacked = fleet.device(name)
            attacked.refresh()
            attacked.check(evil.target_path, body)

        with pytest.raises(TrustError):
            attack("device")
        with pytest.raises(TrustError) as found:
            attack(f"fresh-{time.monotonic_ns()}")
        return found.value

    # 1. Only said to be so.
    assert refused().code is WireErrorCode.UNSIGNED
    # 2. The role signed with the keys that the thief has, in a snapshot and timestamp that are right.
    with fleet.database.read() as session:
        found = service.state(session, FLEET)
    assert found is not None
    role = tuf.next_delegated(found.delegated["model.m"], {evil.target_path: body}, utc_now())
    tuf.sign(role, online.values())
    publish("model.m", role)
    versions = {name: one.signed.version for name, one in {**found.delegated, "model.m": role}.items()}
    versions["targets"] = found.targets.signed.version if found.targets else 0
    snapshot = tuf.next_snapshot(found.snapshot, versions, utc_now())
    tuf.sign(snapshot, online.values())
    publish("snapshot", snapshot)
    timestamp = tuf.next_timestamp(found.timestamp, snapshot.signed.version, utc_now())
    tuf.sign(timestamp, online.values())
    publish("timestamp", timestamp)
    assert refused().code is WireErrorCode.UNTRUSTED
    # 3. A targets file that delegates to the thief's keys.
    thief = next(iter(online.values()))
    targets = tuf.next_targets(found.root, found.targets, ["m"], utc_now())
    targets.signed.delegations.keys[thief.public_key.keyid] = thief.public_key
    targets.signed.delegations.roles["model.m"].keyids.append(thief.public_key.keyid)
    tuf.sign(targets, online.values())
    publish("targets", targets)
    snapshot = tuf.next_snapshot(snapshot, versions | {"targets": targets.signed.version}, utc_now())
    tuf.sign(snapshot, online.values())
    publish("snapshot", snapshot)
    timestamp = tuf.next_timestamp(timestamp, snapshot.signed.version, utc_now())
    tuf.sign(timestamp, online.values())
    publish("timestamp", timestamp)
    assert refused().code is WireErrorCode.UNTRUSTED
    # 4. A root of the thief's own.
    root = tuf.next_root(found.root, {name: [thief.public_key] for name in tuf.TOP_ROLES}, {}, utc_now())
    tuf.sign(root, online.values())
    publish("root", root)
    assert refused().code is WireErrorCode.UNTRUSTED
    assert hashlib.sha256(body).hexdigest() not in str(found.delegated["model.m"].signed.to_dict())


def test_keys_in_a_token(tokens: SoftHsm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pkcs11

    monkeypatch.setenv("SHOAL_PKCS11_PIN", PIN)
    monkeypatch.setenv("PYKCS11LIB", "")
    from pkcs11.util.ec import encode_named_curve_parameters

    token = pkcs11.lib(str(MODULE)).get_token(token_label="shoal")
    with token.open(user_pin=PIN, rw=True) as session:
        curve = {pkcs11.Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}
        parameters = session.create_domain_parameters(pkcs11.KeyType.EC, curve, local=True)
        parameters.generate_keypair(mechanism=pkcs11.Mechanism.EC_KEY_PAIR_GEN, store=True, label="sign", id=b"\x02")
    signer = open_signer(f"pkcs11:token=shoal;id=%02?module-path={MODULE}", lambda: os.environ["SHOAL_PKCS11_PIN"])
    url = f"sqlite:///{tmp_path / 'shoal.db'}"
    migrations.upgrade(url)
    database = Database(url)
    with database.write() as session:
        session.add(Fleet(id=FLEET))
    fleet = Repository(database, tmp_path)
    fleet.want(manifest("a"))
    fleet.take_offline(signer)
    fleet.check(manifest("a"))
    database.dispose()
    with pytest.raises(InvalidError, match="module-path"):
        open_signer("pkcs11:token=shoal", lambda: "")
    with pytest.raises(InvalidError, match="can't be used"):
        open_signer(f"pkcs11:token=absent;id=%02?module-path={MODULE}", lambda: "")
