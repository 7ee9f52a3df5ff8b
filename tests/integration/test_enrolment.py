"""The rules of enrolment over the REST API, and a certificate's renewal over a real broker under mutual TLS."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.config import Config
from agent.identity import Identity, identity_folder, load_identity, save_identity
from agent.keys import fingerprint, new_key, sign, signing_request
from agent.mqtt import LinkUp, MqttLink, MqttMessage
from agent.protocol.codec import decode
from agent.protocol.messages import Certificate
from agent.renewal import ASK_SELDOM_S, Renewal, due_at, tls_context
from fleet_server.enrolment.endpoints import REFUSED_BURST
from fleet_server.enrolment.service import renew
from fleet_server.errors import FleetError
from tests.broker_peer import SecureServer, secure_server
from tests.fleet import wait_until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureServer]:
    with secure_server(tmp_path_factory.mktemp("server"), pending_enrolments=5) as found:
        yield found


@pytest.fixture(autouse=True)
def fresh_gate(server: SecureServer) -> None:
    server.app.state.enrolment_gate = type(server.app.state.enrolment_gate)()


def token(server: SecureServer, **fields: Any) -> str:
    return str(server.post("/enrolment-tokens", fields)["token"])


def test_a_token_has_uses_and_a_device_and_an_end(server: SecureServer) -> None:
    twice = token(server, uses=2)
    key = new_key()
    first = server.ask("t-1", key, twice)
    assert server.ask("t-1", key, twice)["certificate"] == first["certificate"], "a lost answer costs no use"
    server.ask("t-2", new_key(), twice)
    assert server.ask("t-3", new_key(), twice, 401)["code"] == "bad_enrolment_token"
    assert "another device" in server.ask("t-5", new_key(), token(server, device_id="t-4"), 401)["detail"]
    made = server.post("/enrolment-tokens", {"ttl_s": 10})
    assert "token" not in server.get("/enrolment-tokens?limit=1")["items"][0]
    assert server.api.delete(f"/api/v1/enrolment-tokens/{made['id']}").status_code == 204
    assert server.ask("t-6", new_key(), made["token"], 401)["code"] == "bad_enrolment_token"
    wrong = made["token"][:-1] + ("A" if made["token"][-1] != "A" else "B")
    assert server.ask("t-6", new_key(), wrong, 401)["code"] == "bad_enrolment_token"
    stored = (server.folder / "shoal.db").read_bytes() + (server.folder / "shoal.db-wal").read_bytes()
    assert twice.rpartition(".")[2].encode() not in stored


def test_a_device_gets_the_root_it_is_to_trust_with_its_certificate(server: SecureServer) -> None:
    given = server.ask("r-1", new_key(), token(server))
    assert given["trust_root"] == server.get("/trust/metadata/root.json")
    waits = server.ask("r-2", new_key())
    assert (waits["state"], waits["trust_root"]) == ("pending", None)
    server.post(f"/enrolments/{waits['id']}/reject", status=200)


def test_an_id_that_is_held_needs_an_operator_for_another_key(server: SecureServer) -> None:
    server.identity("held-1")
    waiting = server.ask("held-1", new_key(), token(server))
    assert (waiting["state"], waiting["certificate"]) == ("pending", None)
    assert "another key" in waiting["reason"]
    server.post(f"/enrolments/{waiting['id']}/reject", status=200)
    assert server.get(f"/enrolments/{waiting['id']}")["state"] == "rejected"
    assert server.post(f"/enrolments/{waiting['id']}/approve", status=409)["code"] == "enrolment_decided"


def test_without_a_token_a_device_waits_and_only_so_many(server: SecureServer) -> None:
    key = new_key()
    waiting = server.ask("wait-0", key)
    assert server.ask("wait-0", key)["id"] == waiting["id"], "who asks again waits once"
    assert waiting["key_sha256"] == fingerprint(key)
    others = [server.ask(f"wait-{number}", new_key())["id"] for number in range(1, 5)]
    assert server.ask("wait-9", new_key(), None, 429)["code"] == "too_many_enrolments"
    listed = server.get("/enrolments?state=pending")["items"]
    assert [one["device_id"] for one in listed] == [f"wait-{number}" for number in (4, 3, 2, 1, 0)]
    server.post(f"/enrolments/{waiting['id']}/approve", status=200)
    assert "BEGIN CERTIFICATE" in server.get(f"/enrolments/{waiting['id']}")["certificate"]
    for one in others:
        server.post(f"/enrolments/{one}/reject", status=200)


def test_a_registered_key_enrols_by_itself_and_no_other(server: SecureServer) -> None:
    key = new_key()
    server.post("/device-identities", {"device_id": "reg-1", "key_sha256": fingerprint(key)})
    assert server.post("/device-identities", {"device_id": "reg-1"}, 409)["code"] == "device_registered"
    assert server.ask("reg-1", new_key(), token(server), 403)["code"] == "wrong_key"
    assert server.ask("reg-1", key)["state"] == "issued"
    server.post("/device-identities", {"device_id": "reg-2"})
    assert server.ask("reg-2", new_key())["state"] == "pending"
    assert server.ask("reg-2", new_key(), token(server))["state"] == "issued"


@pytest.mark.parametrize("name", ["shoal-server", "Shoal-Server-2", "shoal-alerts", "Shoal-Alerts-2"])
def test_the_server_s_own_names_are_refused(server: SecureServer, name: str) -> None:
    assert server.ask(name, new_key(), token(server), 422)["code"] == "reserved_device_id"


def test_requests_that_are_none_are_refused(server: SecureServer) -> None:
    body = {"device_id": "bad-1", "csr": signing_request(new_key(), "bad-2")}
    assert "common name" in server.post("/enrolments", body, 422)["detail"]
    for csr in ("", "x" * 20_000, body["csr"][:-60], body["csr"].replace("MI", "MJ", 1)):
        assert server.post("/enrolments", {**body, "csr": csr}, 422)["code"] in {"bad_csr", "invalid"}


def test_who_tries_too_often_is_slowed_down(server: SecureServer) -> None:
    body = {"device_id": "slow-1", "csr": "none"}
    codes = [server.api.post("/api/v1/enrolments", json=body).status_code for _ in range(REFUSED_BURST + 15)]
    assert set(codes[:REFUSED_BURST]) == {422}
    assert 429 in codes
    server.app.state.enrolment_gate = type(server.app.state.enrolment_gate)()
    assert server.post("/enrolments", {**body, "csr": "x" * 100_000}, 413)["code"] == "body_too_large"
    endless = server.api.post("/api/v1/enrolments", content=iter([b"{"]))
    assert endless.status_code == 413


class Agent:
    """The agent's own link and renewal, driven by the test's clock."""

    def __init__(self, server: SecureServer, folder: Path, identity: Identity) -> None:
        save_identity(identity_folder(folder), identity)
        self.config = Config(identity.device_id, folder, broker=f"mqtts://127.0.0.1:{server.port}")
        self.events: queue.Queue[MqttMessage | LinkUp] = queue.Queue()
        context = tls_context(self.config)
        assert context is not None
        self.link = MqttLink(self.config, "boot", self.events.put, context)
        self.renewal = Renewal(self.config, self.link, context)
        self.link.start()

    def run(self, wall: float, until: Any) -> None:
        deadline = time.monotonic() + 20
        while not until() and time.monotonic() < deadline:
            try:
                event = self.events.get(timeout=0.05)
            except queue.Empty:
                event = None
            if isinstance(event, LinkUp):
                self.renewal.link_up(event.epoch)
            elif isinstance(event, MqttMessage) and event.topic.endswith("/certificate"):
                self.renewal.answered(decode(event.payload, Certificate))
            if not until():  # by the test's clock the new certificate may be due as well
                self.renewal.tick(time.monotonic(), wall)
        assert until()

    def kept(self, name: str = "identity.json") -> Identity | None:
        return load_identity(identity_folder(self.config.state_dir), name)


def test_a_certificate_is_renewed_in_time_and_the_old_one_kept_until_then(server: SecureServer, tmp_path: Path) -> None:
    old = server.identity("renew-1")
    agent = Agent(server, tmp_path / "renew-1", old)
    agent.run(due_at(old) - 1, lambda: agent.link.connected)
    agent.run(due_at(old) - 1, lambda: agent.kept("next.json") is None)
    agent.run(due_at(old) + 1, lambda: agent.kept() != old)
    new = agent.kept()
    assert new is not None
    assert new.key != old.key
    assert agent.kept("next.json") is None
    assert agent.link.connected
    assert [one["key_sha256"] for one in server.get("/devices/renew-1/identity")["certificates"]].count(
        new.key_sha256
    ) == 1
    agent.link.stop()
    again = Agent(server, tmp_path / "renew-1", new)
    again.run(0, lambda: again.link.connected)
    # One that the broker does not take is given up: here of another CA's making, as after a mistake.
    bad = Identity("renew-1", new.key, new.key_sha256, old.certificate, new.ca)
    again.renewal._next = Identity("renew-1", new_key(), bad.key_sha256)
    again.renewal.answered(Certificate(bad.key_sha256, old.certificate, new.ca, 0.0, 1.0))
    assert again.kept("next.json") is None
    again.renewal.tick(time.monotonic() + ASK_SELDOM_S, 0)
    assert again.kept() == new
    assert again.link.connected
    again.link.stop()


def test_a_renewal_must_be_signed_by_a_key_that_the_device_has(server: SecureServer) -> None:
    held = server.identity("sign-1")
    csr = signing_request(new_key(), "sign-1")
    database, authority = server.app.state.database, server.app.state.authority
    for device, signature in (
        ("sign-1", sign(new_key(), csr.encode())),
        ("sign-1", b""),
        ("nobody-1", sign(held.key, csr.encode())),
    ):
        with pytest.raises(FleetError), database.write() as session:
            renew(session, authority, device, csr, signature)
    with database.write() as session:
        first = renew(session, authority, "sign-1", csr, sign(held.key, csr.encode())).serial
        assert renew(session, authority, "sign-1", csr, sign(held.key, csr.encode())).serial == first
    server.post("/devices/sign-1/revoke", status=200)
    with pytest.raises(FleetError, match="locked out"), database.write() as session:
        renew(session, authority, "sign-1", csr, sign(held.key, csr.encode()))
    wait_until("the eviction", lambda: server.get("/devices/sign-1/identity")["evicted_at"], 30)
