"""The audit log: append-only, a whole chain under concurrent writers, and an event for everything that changes."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from alembic import command
from fastapi import FastAPI
from sqlalchemy import text
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session
from starlette.testclient import TestClient
from tuf.api.metadata import Metadata

from agent.keys import new_key, signing_request
from agent.protocol.manifest import ModelFormat, Precision, TensorSpec
from agent.protocol.messages import Reported
from agent.protocol.version import SPOKEN
from converters.job import Candidate, Measurements, Sharding, StageFile
from fleet_server import audit, migrations
from fleet_server.access import service
from fleet_server.app import create_app, running
from fleet_server.catalog import repository as catalog
from fleet_server.catalog.schemas import GateVerdict
from fleet_server.clock import utc_now
from fleet_server.conversions.service import settle
from fleet_server.conversions.sharder import CutOrder
from fleet_server.db import Database
from fleet_server.models import (
    Alert,
    AuditEvent,
    Deployment,
    Device,
    Fleet,
    GateRun,
    Rollout,
    SampleRequestRow,
    SampleUpload,
    Variant,
    Version,
    WebhookDelivery,
)
from fleet_server.principals import DEFAULT_FLEET, Actor
from fleet_server.settings import Settings
from fleet_server.shards.service import KeepFile
from fleet_server.trust import service as trust
from tests.api_document import document
from tests.databases import without_triggers
from tests.integration.test_api import facts
from tests.integration.test_tenants import ADMIN, Inspector, client, created
from tests.reporting import record_report
from tests.tiny_bundle import tiny_bundle

ACTOR = Actor("user/ada", "user/1", "192.0.2.7", "r-1")


def record(session: Session, number: int, fleet_id: str = DEFAULT_FLEET) -> None:
    detail = {"number": number, "share": 0.1 + number, "nested": {"ä": [None, True, 1e-7]}}
    audit.record(session, fleet_id=fleet_id, actor=ACTOR, action="test", subject=f"x/{number}", detail=detail)


def fill(database: Database, count: int = 5) -> None:
    for number in range(count):
        with database.write() as session:
            record(session, number)


def verify(database: Database, fleet_id: str = DEFAULT_FLEET) -> Any:
    with database.read() as session:
        return service.verify_audit(session, fleet_id)


def test_events_hold_who_from_where_and_follow_each_other(database: Database) -> None:
    assert verify(database).whole
    fill(database)
    with database.read() as session:
        rows = session.query(AuditEvent).order_by(AuditEvent.sequence).all()
    assert [row.sequence for row in rows] == [1, 2, 3, 4, 5]
    assert (rows[0].actor, rows[0].address, rows[0].request_id) == ("user/ada", "192.0.2.7", "r-1")
    assert [row.previous_hash for row in rows] == [audit.FIRST, *(row.hash for row in rows[:-1])]
    found = verify(database)
    assert (found.whole, found.events, found.hash) == (True, 5, rows[-1].hash)


def test_what_fails_leaves_no_event_and_no_gap(database: Database) -> None:
    fill(database, 1)

    def fail() -> None:
        with database.write() as session:
            record(session, 2)
            raise KeyError("no")

    with pytest.raises(KeyError):
        fail()
    fill(database, 1)
    assert (verify(database).whole, verify(database).events) == (True, 2)


def test_large_content_is_kept_as_its_hash(database: Database) -> None:
    with database.write() as session:
        audit.record(
            session, fleet_id=DEFAULT_FLEET, actor="server", action="a", subject="s", after={"x": "y" * 10_000}
        )
    with database.read() as session:
        kept = session.query(AuditEvent).one()
        assert set(kept.after or {}) == {"bytes", "sha256"}
        assert kept.before is None
    assert verify(database).whole


def test_writers_at_once_make_one_chain_a_fleet(database: Database) -> None:
    with database.write() as session:
        session.add(Fleet(id="other"))

    def write(writer: int) -> None:
        for number in range(10):
            with database.write() as session:
                # In either order: the heads are locked in one, so nobody waits for each other.
                for fleet_id in (DEFAULT_FLEET, "other") if writer % 2 else ("other", DEFAULT_FLEET):
                    record(session, number, fleet_id)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    for fleet_id in (DEFAULT_FLEET, "other"):
        assert (verify(database, fleet_id).whole, verify(database, fleet_id).events) == (True, 40)


@pytest.mark.parametrize("change", ["UPDATE audit_events SET actor = 'x'", "DELETE FROM audit_events"])
def test_the_database_refuses_to_change_it(database: Database, change: str) -> None:
    fill(database)
    with pytest.raises(DatabaseError, match="append-only"), database.write() as session:
        session.execute(text(change))
    if not database.is_sqlite:
        with pytest.raises(DatabaseError, match="append-only"), database.write() as session:
            session.execute(text("TRUNCATE audit_events"))
    assert verify(database).whole


@pytest.mark.parametrize(
    ("change", "sequence", "said"),
    [
        ("UPDATE audit_events SET actor = 'eve' WHERE sequence = 3", 3, "was changed"),
        ("UPDATE audit_events SET address = '' WHERE sequence = 2", 2, "was changed"),
        ("DELETE FROM audit_events WHERE sequence = 3", 3, "is missing"),
        ("DELETE FROM audit_events WHERE sequence = 1", 1, "is missing"),
        ("DELETE FROM audit_events WHERE sequence = 5", 5, "cut off"),
        ("UPDATE audit_events SET hash = 'x' WHERE sequence = 4", 4, "was changed"),
        ("UPDATE audit_events SET previous_hash = 'x' WHERE sequence = 4", 4, "does not follow"),
        ("DELETE FROM audit_heads", 6, "its head says 0"),
    ],
)
def test_who_owns_the_database_is_found_out(database: Database, change: str, sequence: int, said: str) -> None:
    fill(database)
    with database.write() as session, without_triggers(session):
        session.execute(text(change))
    found = verify(database)
    assert not found.whole
    assert found.broken.sequence == sequence
    assert said in found.broken.reason


def test_events_of_before_the_chain_become_its_beginning(database: Database) -> None:
    fill(database, 3)
    for direction, revision in ((command.downgrade, "0005"), (command.upgrade, "head")):
        with database.write() as session:
            direction(migrations.configuration(session.connection()), revision)
    fill(database, 2)
    assert (verify(database).whole, verify(database).events) == (True, 5)


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    settings = Settings(
        state_dir=tmp_path_factory.mktemp("state"), broker_url="mqtt://127.0.0.1:1", conversion_workers=0,
        admin_token=ADMIN,
    )  # fmt: skip
    app = create_app(settings)
    with running(app):
        app.state.inspector = Inspector()
        yield app


class Walk:
    """Calls operations that change something, and sees that each wrote its event."""

    def __init__(self, api: TestClient) -> None:
        self.api = api
        self.done: set[str] = set()

    def events(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.api.get("/api/v1/audit-events").json()["items"]
        return found

    def __call__(
        self, operation: str, action: str, method: str, path: str, *, actor: str | None = None, **options: Any
    ) -> Any:
        last = next((one["sequence"] for one in self.events()), 0)
        answer = self.api.request(method, f"/api/v1/{path}", **options)
        assert answer.is_success, f"{operation}: {answer.text}"
        new = [one for one in self.events() if one["sequence"] > last]
        mine = next(one for one in new if one["action"] == action)
        if actor is None:
            assert mine["address"] == "testclient"
            assert mine["request_id"] == answer.headers["x-request-id"]
        assert mine["actor"] in ({"admin", "user/ada"} if actor is None else {actor})
        self.done.add(operation)
        return answer.json() if answer.content else None


def test_every_operation_that_changes_something_writes_an_event(application: FastAPI) -> None:
    walk = Walk(client(application, ADMIN))
    database: Database = application.state.database
    password = "correct horse battery"
    walk("create_fleet", "fleet.create", "post", "fleets", json={"id": "plant7"})
    walk("create_user", "user.create", "post", "users", json={"name": "ada", "role": "releaser", "password": password})
    walk("change_user", "user.update", "patch", "users/ada", json={"role": "admin"})
    session_token = walk("login", "session.open", "post", "login", json={"name": "ada", "password": password})["token"]
    second = {"Authorization": f"Bearer {session_token}"}
    walk("logout", "session.close", "post", "logout", headers=second)
    again = created(walk.api.post("/api/v1/login", json={"name": "ada", "password": password}))
    second = {"Authorization": f"Bearer {again['token']}"}
    token_id = walk("create_token", "token.create", "post", "tokens", json={"name": "ci", "role": "viewer"})["id"]
    walk("revoke_token", "token.revoke", "delete", f"tokens/{token_id}")
    digest = walk("upload", "upload.create", "post", "uploads", content=b"weights")["digest"]
    version = {"name": "1", "sources": [{"format": "onnx", "digest": digest}], "evaluation": digest}
    walk("create_version", "version.create", "post", "models/m/versions", json=version)
    walk("create_profile", "profile.create", "post", "profiles", json={"name": "p", "runtime": "onnx"})
    walk(
        "create_profile",
        "profile.create",
        "post",
        "profiles",
        json={"name": "q", "runtime": "onnx", "match": {"arch": "x"}},
    )
    delivery = {"rate": "1 MB/s"}
    walk("change_profile", "profile.update", "patch", "profiles/p", json={"delivery": delivery})
    walk("delete_profile", "profile.delete", "delete", "profiles/q")
    wanted = {"version": "m@1", "profiles": ["p"]}
    variant_id = walk("build_variants", "variant.build", "post", "variants", json=wanted)[0]["id"]
    walk("cancel_build", "variant.cancel", "post", f"variants/{variant_id}/cancel")
    with database.write() as session:
        record_report(session, "d", Reported(SPOKEN, "b", 1, 0, facts()), utc_now())
    walk("change_device", "device.update", "patch", "devices/d", json={"tags": {"line": "3"}})
    make_ready(database, variant_id, digest)
    run = {"version": "m@1", "profile": "p"}
    with database.write() as session:
        run_row = GateRun(
            fleet_id=DEFAULT_FLEET, variant_id=variant_id, state="running", candidates=[],
            data={"digest": digest, "size": 1, "chunk_size": 1}, deadline_at=utc_now() + dt.timedelta(hours=1),
        )  # fmt: skip
        session.add(run_row)
    walk("cancel_gate_run", "gate.cancel", "post", f"gate-runs/{run_row.id}/cancel")
    walk("create_gate_run", "gate.run", "post", "gate-runs", json=run)
    running_run = created(walk.api.get("/api/v1/gate-runs?state=running"))["items"][0]["id"]
    created(walk.api.post(f"/api/v1/gate-runs/{running_run}/cancel"))
    ordered = {"versions": ["m@1"], "allow_unproven": True}
    walk("create_bundle", "bundle.create", "post", "bundles", json=ordered)
    walk("change_fleet", "fleet.update", "patch", "fleets/default", json={"approvals": 1})
    for end in ("reject", "approve"):
        rollout = walk("create_rollout", "rollout.create", "post", "rollouts", json=rollout_body())["id"]
        walk(f"{end}_rollout", f"rollout.{end}", "post", f"rollouts/{rollout}/{end}", json={}, headers=second)
    walk("promote_rollout", "rollout.promote", "post", f"rollouts/{rollout}/promote", json={"full": True})
    walk("pause_rollout", "rollout.pause", "post", f"rollouts/{rollout}/pause")
    with database.write() as session:  # while paused: the engine ends a running rollout whose devices have all failed
        failed = session.query(Deployment).filter_by(rollout_id=rollout).one()
        failed.phase, failed.settled_at = "failed", utc_now()
    walk("retry_rollout", "rollout.retry", "post", f"rollouts/{rollout}/retry")
    walk.api.post(f"/api/v1/rollouts/{rollout}/pause")
    walk("resume_rollout", "rollout.resume", "post", f"rollouts/{rollout}/resume")
    walk("abort_rollout", "rollout.abort", "post", f"rollouts/{rollout}/abort", json={})
    walk("hold_device", "device.hold", "post", "devices/d/hold", json={"reason": "under repair"})
    walk("release_device", "device.release", "post", "devices/d/release")
    pinned = {"version": "m@1", "reason": "compared", "allow_unproven": True}
    walk.api.patch("/api/v1/fleets/default", json={"approvals": 0})
    walk("pin_device", "rollout.create", "post", "devices/d/pin", json=pinned)
    enrolment_operations(walk)
    trust_operations(walk, application.state.settings)
    webhook_operations(walk, database)
    sample_operations(walk, application)
    shard_operations(walk, application)
    release_operations(walk)
    alert_operations(walk, database)
    command_operations(walk, database)
    with database.write() as session:
        session.get_one(Device, "d").online = False
    walk("forget_device", "device.forget", "delete", "devices/d")
    created(walk.api.post("/api/v1/models/n/versions", json=version))
    walk("delete_version", "version.delete", "delete", "models/n/versions/1")
    walk("delete_user", "user.delete", "delete", "users/ada")
    changing = {
        operation["operationId"]
        for path, item in document()["paths"].items()
        for method, operation in item.items()
        if method != "get" and path.startswith("/api/v1")
    }
    changing -= {"preview_rollout", "infer_model"}  # questions with a body
    assert walk.done == changing
    assert walk.api.get("/api/v1/audit-events/verify").json()["whole"]
    (moved, *_) = walk.api.get("/api/v1/audit-events", params={"action": "rollout.pause"}).json()["items"]
    assert (moved["before"], moved["after"]) == ({"state": "running"}, {"state": "paused"})
    with database.read() as session:
        assert session.query(Rollout).count() == 3


def enrolment_operations(walk: Walk) -> None:
    token = walk("create_enrolment_token", "enrolment_token.create", "post", "enrolment-tokens", json={"uses": 2})
    body = {"device_id": "e-1", "csr": signing_request(new_key(), "e-1")}
    enrolled = {**body, "token": token["token"]}
    walk("create_enrolment", "device.enrol", "post", "enrolments", json=enrolled, actor=f"token {token['id']}")
    walk("delete_enrolment_token", "enrolment_token.delete", "delete", f"enrolment-tokens/{token['id']}")
    for end, action in (("reject", "enrolment.reject"), ("approve", "device.enrol")):
        asked = {"device_id": "e-2", "csr": signing_request(new_key(), "e-2")}
        waits = created(walk.api.post("/api/v1/enrolments", json=asked))["id"]
        walk(f"{end}_enrolment", action, "post", f"enrolments/{waits}/{end}")
    walk("register_device", "device.pre_register", "post", "device-identities", json={"device_id": "e-3"})
    walk("revoke_device", "device.revoke", "post", "devices/e-2/revoke")
    broker = {"csr": signing_request(new_key(), "broker"), "names": ["broker.example"]}
    walk("create_server_certificate", "server_certificate.create", "post", "server-certificates", json=broker)


def webhook_operations(walk: Walk, database: Database) -> None:
    hook = {"url": "https://hooks.invalid/", "types": ["shoal.none"]}
    webhook = walk("create_webhook", "webhook.create", "post", "webhooks", json=hook)["id"]
    walk("change_webhook", "webhook.update", "patch", f"webhooks/{webhook}", json={"description": "the pager"})
    walk("rotate_webhook_secret", "webhook.rotate", "post", f"webhooks/{webhook}/rotate-secret", json={})
    delivery = walk("test_webhook", "webhook.test", "post", f"webhooks/{webhook}/test")["id"]
    with database.write() as session:
        session.get_one(WebhookDelivery, delivery, with_for_update=True).state = "dead"
    walk("redeliver", "webhook.redeliver", "post", f"webhook-deliveries/{delivery}/redeliver")
    walk("delete_webhook", "webhook.delete", "delete", f"webhooks/{webhook}")


def sample_operations(walk: Walk, application: FastAPI) -> None:
    walk("set_sampling_rule", "sampling.set", "put", "models/m/sampling-rules/p", json={"samples": 7})
    walk("delete_sampling_rule", "sampling.delete", "delete", "models/m/sampling-rules/p")
    with application.state.database.write() as session:
        request = SampleRequestRow(
            fleet_id=DEFAULT_FLEET, model="m", state="running", samples=1, size=1, created_by="",
            deadline_at=utc_now() + dt.timedelta(hours=1),
        )  # fmt: skip
        session.add(request)
        session.flush()
        stored = SampleUpload(
            fleet_id=DEFAULT_FLEET, request_id=request.id, device_id="d", phase="stored", told=False, digest="a" * 64,
            size=1, stored_at=utc_now(), listing=[],
        )  # fmt: skip
        session.add(stored)
    body = {"model": "m", "devices": ["d"]}
    walk("create_sample_request", "samples.request", "post", "sample-requests", json=body)
    walk("cancel_sample_request", "samples.cancel", "post", f"sample-requests/{request.id}/cancel")
    walk("delete_sample_set", "samples.delete", "delete", f"sample-sets/{stored.id}")


class Sharder:
    """Stands for the child process that cuts the file."""

    def cut(self, order: CutOrder, keep: KeepFile) -> Sharding:
        stage = StageFile(
            path="stage.onnx", digest=order.digest, size=1, evaluation=None, calibration=None,
            device=order.devices[0].device, nodes=1, compute_s=0.1, weight_bytes=1, activation_bytes=1, bytes_in=1,
            bytes_out=1, transfer_s=0.1,
        )  # fmt: skip
        return Sharding((stage,), 0.1, 0.0, exact=True, quantized=False)


def shard_operations(walk: Walk, application: FastAPI) -> None:
    application.state.sharder = Sharder()
    with application.state.database.write() as session:
        device = session.get_one(Device, "d")
        device.online, device.hold = True, None
    body = {"version": "m@1", "target": "id==d"}
    plan = walk("create_shard_plan", "shard_plan.create", "post", "shard-plans", json=body)["id"]
    walk("delete_shard_plan", "shard_plan.delete", "delete", f"shard-plans/{plan}")


def release_operations(walk: Walk) -> None:
    digest = created(walk.api.post("/api/v1/uploads", content=tiny_bundle("0.2.0")))["digest"]
    walk("create_agent_release", "agent_release.create", "post", "agent-releases", json={"digest": digest})
    walk("delete_agent_release", "agent_release.delete", "delete", "agent-releases/0.2.0")


def alert_operations(walk: Walk, database: Database) -> None:
    rule = {"name": "hot", "metric": "temperature_c", "threshold": 80}
    walk("create_alert_rule", "alert_rule.create", "post", "alert-rules", json=rule)
    walk("change_alert_rule", "alert_rule.update", "patch", "alert-rules/hot", json={"threshold": 90})
    walk("create_alert_route", "alert_route.create", "post", "alert-routes", json={"name": "bus", "kind": "mqtt"})
    walk("change_alert_route", "alert_route.update", "patch", "alert-routes/bus", json={"repeat_s": 0})
    walk("test_alert_route", "alert_route.test", "post", "alert-routes/bus/test")
    walk("delete_alert_route", "alert_route.delete", "delete", "alert-routes/bus")
    with database.write() as session:
        alert = Alert(
            fleet_id=DEFAULT_FLEET, rule_id="", rule="hot", metric="temperature_c", severity="info", state="firing",
            subject="device/d", since=utc_now(),
        )  # fmt: skip
        session.add(alert)
    walk("acknowledge_alert", "alert.acknowledge", "post", f"alerts/{alert.id}/acknowledge", json={})
    walk("delete_alert_rule", "alert_rule.delete", "delete", "alert-rules/hot")
    quiet = {"rule": "*", "ends_at": (utc_now() + dt.timedelta(hours=1)).isoformat(), "comment": "works"}
    silence = walk("create_alert_silence", "alert_silence.create", "post", "alert-silences", json=quiet)["id"]
    walk("delete_alert_silence", "alert_silence.delete", "delete", f"alert-silences/{silence}")


def command_operations(walk: Walk, database: Database) -> None:
    with database.write() as session:
        device = session.get_one(Device, "d")
        device.facts = {**device.facts, "features": ["commands"], "commands": {"facts": True}}
        device.online = False
    command = walk("command_device", "command.create", "post", "devices/d/commands", json={"kind": "facts"})
    walk("cancel_command", "command.cancel", "post", f"commands/{command['id']}/cancel")
    walk("command_devices", "command.create", "post", "commands", json={"kind": "facts", "devices": ["d"]})


def trust_operations(walk: Walk, settings: Settings) -> None:
    walk("make_key", "trust.key", "post", "trust/keys", json={"role": "timestamp"})
    root = Metadata.from_bytes(walk.api.get("/api/v1/trust/metadata/root.json").content)
    root.signed.version += 1
    root.signatures.clear()
    signers = trust.key_folder(settings, DEFAULT_FLEET).load()
    for keyid in root.signed.roles["root"].keyids:
        root.sign(signers[keyid], append=True)
    signed = {"role": "root", "body": root.to_bytes().decode()}
    walk("add_signatures", "trust.sign", "post", "trust/signatures", json=signed)


def rollout_body() -> dict[str, Any]:
    return {"version": "m@1", "target": {"all": True}, "allow_unproven": True, "strategy": {"stop_when": []}}


def make_ready(database: Database, variant_id: str, digest: str) -> None:
    """The variant as a build that passed the gate leaves it."""
    tensor = TensorSpec("x", "float32", (-1, 8))
    measured = Measurements(
        size=1, samples=1, accuracy=0.9, macro_precision=None, macro_recall=None, macro_f1=None, classes=(),
        agreement=1.0, max_difference=0.0, latency_p50_ms=1.0, latency_p95_ms=1.0, memory_mb=None, provider="cpu",
    )  # fmt: skip
    candidate = Candidate(
        "fp32", Precision.FP32, digest=digest, format=ModelFormat.ONNX, inputs=(tensor,), outputs=(tensor,),
        measurements=measured,
    )  # fmt: skip
    with database.write() as session:
        variant = session.get_one(Variant, variant_id)
        version = session.get_one(Version, variant.version_id)
        variant.candidates = msgspec.to_builtins([candidate])
        catalog.keep_candidates(session, variant, {digest})
        settle(session, variant, version, candidate, GateVerdict(passed=True, measured_on="server", checks=[]))
