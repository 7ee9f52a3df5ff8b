"""Fleets are tenants: with objects in one, a token of another finds nothing of them at any endpoint there is."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from agent.protocol.facts import DeviceFacts, RuntimeFacts
from agent.protocol.messages import HostWindow, ModelWindow, Reported, TelemetryBatch
from agent.protocol.version import SPOKEN
from fleet_server.alerts.schemas import RouteSpec, RuleSpec
from fleet_server.app import create_app, running
from fleet_server.catalog.schemas import UploadView, VersionCreate
from fleet_server.catalog.service import InspectionRecord, discard_uploads
from fleet_server.clock import utc_now
from fleet_server.models import (
    Alert,
    AlertRoute,
    AlertRule,
    AlertSilence,
    CommandLogLine,
    Deployment,
    DeviceCommand,
    DeviceIdentity,
    Enrolment,
    GateRun,
    GateTrial,
    ModelDrift,
    Rollout,
    SampleRequestRow,
    SampleUpload,
    SamplingRule,
    ShardPlan,
    Variant,
    Version,
    WebhookDelivery,
)
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.samples.schemas import SAMPLES_FOLDER, SamplingSpec
from fleet_server.settings import Settings
from fleet_server.telemetry import service as telemetry
from tests.api_document import document
from tests.reporting import record_report
from tests.tiny_bundle import tiny_bundle

ADMIN = "the-admin-of-tests"
METHODS = {"get", "post", "put", "patch", "delete"}
OPERATIONS = {
    operation["operationId"]: (method, path)
    for path, item in document()["paths"].items()
    if path.startswith("/api/v1")
    for method, operation in item.items()
    if method in METHODS
}
TENSOR = {"name": "x", "dtype": "float32", "shape": [-1, 8]}
STAGE = {
    "model": "alpha-model.stage-1-of-1", "version": "1", "device": "alpha-device", "nodes": 1, "compute_s": 1.0,
    "weight_bytes": 1, "activation_bytes": 1, "memory_limit": 1, "bytes_in": 1, "bytes_out": 1, "transfer_s": 0.0,
    "speed": 1.0, "rollout": None, "serves": False,
}  # fmt: skip
SECRET = b"alpha's weights"
SAMPLES = hashlib.sha256(SECRET).hexdigest()


class Inspector:
    """Stands for the child process that loads the files."""

    def inspect(self, wanted: VersionCreate, keep: Callable[[Path], UploadView]) -> InspectionRecord:
        return InspectionRecord(inputs=[TENSOR], outputs=[TENSOR], inspection={})


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


def client(application: FastAPI, token: str, **headers: str) -> TestClient:
    headers["Authorization"] = f"Bearer {token}"
    return TestClient(application, base_url="http://localhost", headers=headers, raise_server_exceptions=False)


def created(answer: Any) -> Any:
    assert answer.is_success, answer.text
    return answer.json()


@pytest.fixture(scope="module")
def alpha(application: FastAPI, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Something of everything in the default fleet, all of it called alpha; by the name of its path parameter."""
    api = client(application, ADMIN)
    digest = created(api.post("/api/v1/uploads", content=SECRET))["digest"]
    facts = DeviceFacts(
        agent_version="1", os="", kernel="", arch="x86_64", cpu_model="", cpu_cores=1, cpu_features=(), memory_mb=1,
        disk_free_mb=1, runtimes=(RuntimeFacts("onnx", "onnxruntime", "1", ("cpu",)),),
    )  # fmt: skip
    window = ModelWindow("alpha-deployment", "alpha-model", "1", "a" * 64, "cpu", 1, 0, 0, 1, {}, ())
    with application.state.database.write() as session:
        record_report(session, "alpha-device", Reported(SPOKEN, "b", 1, 0, facts), utc_now())
        batch = TelemetryBatch(SPOKEN, "alpha-spool", 1, 0.0, 1.0, (window,), HostWindow())
        assert telemetry.store_batch(session, "alpha-device", batch, utc_now())
    created(api.post("/api/v1/profiles", json={"name": "alpha-profile", "runtime": "onnx"}))
    version = {"name": "1", "sources": [{"format": "onnx", "digest": digest}]}
    created(api.post("/api/v1/models/alpha-model/versions", json=version))
    wanted = {"version": "alpha-model@1", "profiles": ["alpha-profile"]}
    variant_id = created(api.post("/api/v1/variants", json=wanted))[0]["id"]
    bundle = created(api.post("/api/v1/uploads", content=tiny_bundle("1")))["digest"]
    created(api.post("/api/v1/agent-releases", json={"digest": bundle}))
    user = {"name": "alpha-user", "role": "viewer", "password": "correct horse battery"}
    created(api.post("/api/v1/users", json=user))
    token_id = created(api.post("/api/v1/tokens", json={"name": "alpha-token", "role": "viewer"}))["id"]
    hook = {"url": "https://alpha.example/hook", "types": ["shoal.*"], "active": False}
    webhook_id = created(api.post("/api/v1/webhooks", json=hook))["id"]
    enrolment_token_id = created(api.post("/api/v1/enrolment-tokens", json={"tags": {"of": "alpha"}}))["id"]
    file = tmp_path_factory.mktemp("samples") / "samples.npz"
    file.write_bytes(SECRET)
    application.state.artifacts.below(SAMPLES_FOLDER).put_file(file)
    with application.state.database.write() as session:
        variant = session.get_one(Variant, variant_id)
        version_row = session.get_one(Version, variant.version_id)
        target, strategy = {"all": True}, {"stages": [{"percent": 100}]}
        of_fleet = {"fleet_id": DEFAULT_FLEET}
        rollout = Rollout(
            **of_fleet, name="alpha", version_id=version_row.id, state="paused", target=target, strategy=strategy
        )
        run = GateRun(
            **of_fleet,
            variant_id=variant_id,
            state="running",
            candidates=[],
            data={"digest": digest},
            deadline_at=utc_now(),
        )
        asked = Enrolment(
            **of_fleet,
            device_id="alpha-device",
            key_sha256="a" * 64,
            csr="",
            state="pending",
            reason="alpha",
            address="",
        )
        identity = DeviceIdentity(**of_fleet, device_id="alpha-device", created_by="alpha-user")
        letter = WebhookDelivery(
            **of_fleet, webhook_id=webhook_id, event_id="alpha-event", type="t", subject="alpha", body="{}"
        )
        alert_rule = AlertRule(
            **of_fleet, name="alpha-rule", created_by="alpha-user",
            spec=RuleSpec.model_validate({"metric": "offline", "enabled": False}).model_dump(mode="json"),
        )  # fmt: skip
        alert_route = AlertRoute(
            **of_fleet, name="alpha-route", created_by="alpha-user",
            spec=RouteSpec.model_validate({"kind": "mqtt"}).model_dump(mode="json"),
        )  # fmt: skip
        alert = Alert(
            **of_fleet, rule_id="", rule="alpha-rule", metric="offline", severity="info", subject="device/alpha-device",
            device_id="alpha-device", state="firing", since=utc_now(),
        )  # fmt: skip
        silence = AlertSilence(**of_fleet, rule="x", ends_at=utc_now() + dt.timedelta(days=1), comment="alpha",
                               created_by="alpha-user")  # fmt: skip
        drift = ModelDrift(**of_fleet, device_id="alpha-device", model="alpha-model", version="1", series_id=1,
                           worst=0.1, input_drift=0.1, requests=1, since=utc_now(), at=utc_now())  # fmt: skip
        session.add_all([alert_rule, alert_route, alert, silence, drift])
        session.add_all([rollout, run, asked, identity, letter])
        session.flush()
        rule = SamplingRule(
            **of_fleet,
            model_id=version_row.model_id,
            profile_id=variant.profile_id,
            spec=SamplingSpec().model_dump(),
            created_by="alpha-user",
        )
        wanted_samples = SampleRequestRow(
            **of_fleet, model="alpha-model", state="running", samples=1, size=1, created_by="alpha-user",
            deadline_at=utc_now() + dt.timedelta(days=1),
        )  # fmt: skip
        session.add_all([rule, wanted_samples])
        session.flush()
        samples = SampleUpload(
            **of_fleet, request_id=wanted_samples.id, device_id="alpha-device", phase="stored", told=False,
            digest=SAMPLES, size=len(SECRET), stored_at=utc_now(), listing=[],
        )  # fmt: skip
        session.add(samples)
        session.flush()
        command = DeviceCommand(
            **of_fleet, device_id="alpha-device", kind="logs", arguments={}, state="succeeded", created_by="alpha-user",
            deadline_at=utc_now(),
        )  # fmt: skip
        session.add(command)
        session.flush()
        session.add(
            CommandLogLine(
                command_id=command.id, sequence=1, at=0.0, level="INFO", source="agent", logger="agent", text="alpha"
            )
        )
        plan = ShardPlan(
            **of_fleet, version_id=version_row.id, state="failed", order={}, stages=[STAGE], created_by="alpha-user",
            proof={"difference": 0.0, "exact": True, "quantized": False, "whole_s": 1.0},
        )  # fmt: skip
        session.add(plan)
        session.flush()
        session.add(GateTrial(**of_fleet, run_id=run.id, device_id="alpha-device"))
        session.add(
            Deployment(
                **of_fleet, rollout_id=rollout.id, device_id="alpha-device", model_id=version_row.model_id,
                version_id=version_row.id, variant_id=variant_id, stage=0,
            )
        )  # fmt: skip
        return {
            "device_id": "alpha-device", "name": "alpha-profile", "model": "alpha-model", "version": "1",
            "variant_id": variant_id, "digest": digest, "run_id": run.id, "plan_id": plan.id, "rollout_id": rollout.id,
            "user": "alpha-user", "token_id": token_id, "fleet": DEFAULT_FLEET,
            "webhook_id": webhook_id, "delivery_id": letter.id,
            "alert_rule": "alpha-rule", "alert_route": "alpha-route", "alert_id": alert.id, "silence_id": silence.id,
            "command_id": command.id, "sample_request_id": wanted_samples.id, "set_id": samples.id,
            "enrolment_id": asked.id, "enrolment_token_id": enrolment_token_id,
        }  # fmt: skip


@pytest.fixture(scope="module")
def beta(application: FastAPI, alpha: dict[str, str]) -> TestClient:
    """An admin of another fleet, who has a version and a profile too."""
    wide = client(application, ADMIN)
    created(wide.post("/api/v1/fleets", json={"id": "beta"}))
    in_beta = client(application, ADMIN, **{"X-Shoal-Fleet": "beta"})
    token = created(in_beta.post("/api/v1/tokens", json={"name": "theirs", "role": "admin"}))["token"]
    api = client(application, token)
    digest = created(api.post("/api/v1/uploads", content=b"their own"))["digest"]
    version = {"name": "1", "sources": [{"format": "onnx", "digest": digest}]}
    created(api.post("/api/v1/models/own/versions", json=version))
    created(api.post("/api/v1/profiles", json={"name": "own", "runtime": "onnx"}))
    return api


def bodies(alpha: dict[str, str]) -> dict[str, list[tuple[dict[str, Any], int]]]:
    """What one might send of another fleet's things, and the answer to it; every operation with a body has a line."""
    version = {"name": "9", "sources": [{"format": "onnx", "digest": alpha["digest"]}]}
    target = {"devices": ["alpha-device"]}
    return {
        "create_version": [(version, 422), (version | {"name": "1"}, 422)],
        "build_variants": [
            ({"version": "alpha-model@1", "profiles": ["own"]}, 404),
            ({"version": "own@1", "profiles": ["alpha-profile"]}, 404),
        ],
        "create_gate_run": [
            ({"version": "alpha-model@1", "profile": "own"}, 404),
            ({"version": "own@1", "profile": "alpha-profile"}, 404),
        ],
        "create_shard_plan": [
            ({"version": "alpha-model@1", "target": "id==*"}, 404),
            ({"version": "own@1", "target": "id==alpha-*"}, 422),
        ],
        "create_agent_release": [({"digest": alpha["digest"]}, 422)],
        "create_rollout": [
            ({"version": "alpha-model@1", "target": {"all": True}}, 404),
            ({"version": "own@1", "target": target}, 404),
            ({"version": "own@1", "target": {"profiles": ["alpha-profile"]}}, 404),
            ({"version": "own@1", "target": {"all": True}}, 422),
        ],
        "preview_rollout": [
            ({"version": "alpha-model@1", "target": {"all": True}}, 404),
            ({"version": "own@1", "target": target}, 404),
        ],
        "create_bundle": [
            ({"versions": ["alpha-model@1"]}, 404),
            ({"versions": ["own@1"], "profiles": ["alpha-profile"]}, 404),
        ],
        "change_device": [({"tags": {"mine": "yes"}}, 404), ({"profile": "own"}, 404)],
        "change_profile": [({"delivery": {"rate": "1 MB/s"}}, 404)],
        "abort_rollout": [({"revert": True}, 404)],
        "promote_rollout": [({"full": True}, 404)],
        "pin_device": [({"version": "alpha-model@1", "reason": "mine"}, 404)],
        "hold_device": [({"reason": "mine"}, 404)],
        "approve_rollout": [({"comment": "fine"}, 404)],
        "reject_rollout": [({"comment": "no"}, 404)],
        "change_fleet": [({"approvals": 1}, 404)],
        "change_user": [({"role": "admin"}, 404), ({"password": "another password"}, 404)],
        "create_user": [
            ({"name": "wide", "role": "admin", "password": "correct horse battery", "server_wide": True}, 403)
        ],
        "create_token": [({"name": "wide", "role": "admin", "server_wide": True}, 403)],
        "create_fleet": [({"id": "gamma"}, 403)],
        "set_sampling_rule": [({"samples": 1}, 404)],
        "create_sample_request": [
            ({"model": "alpha-model", "devices": ["alpha-device"]}, 404),
            ({"model": "own", "devices": ["alpha-device"]}, 404),
            ({"model": "own", "query": "id==alpha-*"}, 422),
        ],
        "infer_model": [({"inputs": []}, 404)],
        "acknowledge_alert": [({}, 404)],
        "change_alert_rule": [({"enabled": True}, 404)],
        "change_alert_route": [({"enabled": True}, 404)],
        "create_alert_silence": [({"query": "site==alpha", "ends_at": "2999-01-01T00:00:00Z", "comment": "x"}, 422)],
        "command_device": [({"kind": "facts"}, 404)],
        "command_devices": [
            ({"kind": "facts", "devices": ["alpha-device"]}, 404),
            ({"kind": "facts", "query": "id==alpha-*"}, 422),
        ],
        "change_webhook": [({"active": True}, 404)],
        "rotate_webhook_secret": [({}, 404)],
        "create_server_certificate": [({"csr": "", "names": ["broker"]}, 403)],
        "register_device": [({"device_id": "alpha-device"}, 409)],
    }


def documented(operation: str, status: int) -> list[str]:
    """The codes that an operation says it may answer with a status."""
    method, path = OPERATIONS[operation]
    response = document()["paths"][path][method]["responses"][str(status)]
    codes: list[str] = response["content"]["application/problem+json"]["schema"]["allOf"][1]["properties"]["code"][
        "enum"
    ]
    return codes


# Name nothing that is there already, or nothing that is secret.
OWN = {"login", "logout", "show_me", "create_profile", "upload", "create_enrolment_token", "create_enrolment"}
OWN |= {"rollout_schema", "processing_schema"}  # the same for all
OWN |= {"create_webhook", "create_alert_rule", "create_alert_route"}
OWN |= {"show_login", "show_authority", "show_revocations"}
OWN |= {"show_trust", "trust_metadata", "add_signatures", "make_key"}  # a repository a fleet: tested by its root below
OWN |= {"fetch_artifact"}  # by a ticket for one content: tests/integration/test_downloads.py
# Whoever knows a request's random id may ask what became of it: the device that made it is nobody yet.
OWN |= {"show_enrolment"}
# Without a path parameter, and no list of things of the fleet.
NO_LISTS = {"list_architectures", "verify_events", "show_overview", "overview_history"}


@pytest.mark.parametrize("operation", sorted(set(OPERATIONS) - OWN))
def test_another_fleet_finds_nothing(operation: str, alpha: dict[str, str], beta: TestClient) -> None:
    method, path = OPERATIONS[operation]
    filled = path.format(**alpha)
    for body, status in bodies(alpha).get(operation, []):
        assert method in {"post", "patch", "put"}
        answer = beta.request(method, filled, json=body)
        assert answer.status_code == status, f"{operation} {body}: {answer.text}"
        assert answer.json()["code"] in documented(operation, answer.status_code)
    if operation in bodies(alpha):
        return
    answer = beta.request(method, filled)
    if "{" in path:
        assert answer.status_code == 404, answer.text
        assert answer.json()["code"] in documented(operation, 404)
        return
    assert method == "get", f"{operation} has no line in bodies()"
    assert answer.status_code == 200
    said = answer.text
    assert "alpha" not in said
    assert not any(one in said for name, one in alpha.items() if name.endswith(("_id", "digest")))


@pytest.mark.parametrize(
    "query",
    [
        "variants?version=alpha-model@1", "variants?profile=alpha-profile", "gate-runs?version=alpha-model@1",
        "devices?profile=alpha-profile", "deployments?device=alpha-device", "rollouts?model=alpha-model",
        "telemetry/models?device=alpha-device", "telemetry/hosts?device=alpha-device",
    ],
)  # fmt: skip
def test_filters_find_nothing_either(query: str, beta: TestClient) -> None:
    answer = beta.get(f"/api/v1/{query}")
    assert answer.status_code == 404 or answer.json()["items"] == []


def test_the_other_fleet_sees_all_of_it(application: FastAPI, alpha: dict[str, str]) -> None:
    """Or the test above would prove nothing."""
    api = client(application, ADMIN)
    for operation, (method, path) in OPERATIONS.items():
        if method == "get" and operation not in OWN:
            answer = api.get(path.format(**alpha))
            assert answer.status_code == 200, answer.text
            if "{" not in path and operation not in NO_LISTS:
                assert answer.json()["items"], operation


def test_the_header_opens_only_what_the_token_may(application: FastAPI, beta: TestClient) -> None:
    for fleet in (b"default", b"nowhere", b"a\xff"):
        answer = beta.get("/api/v1/devices", headers={"X-Shoal-Fleet": fleet})
        assert (answer.status_code, answer.json()["code"]) == (403, "fleet_not_yours")
    wide = client(application, ADMIN, **{"X-Shoal-Fleet": "beta"})
    assert wide.get("/api/v1/devices").json()["items"] == []
    assert wide.get("/api/v1/me").json()["fleet"] == "beta"
    assert [one["name"] for one in wide.get("/api/v1/models").json()["items"]] == ["own"]


def test_the_same_bytes_belong_to_who_brought_them(
    application: FastAPI, alpha: dict[str, str], beta: TestClient
) -> None:
    mine = client(application, ADMIN)
    digest = created(mine.post("/api/v1/uploads", content=b"waits for its version"))["digest"]
    assert beta.get(f"/api/v1/artifacts/{digest}").status_code == 404
    assert created(beta.post("/api/v1/uploads", content=b"waits for its version"))["digest"] == digest
    assert beta.get(f"/api/v1/artifacts/{digest}").content == b"waits for its version"
    discard_uploads(application.state.database, application.state.artifacts, "beta", [digest])
    assert beta.get(f"/api/v1/artifacts/{digest}").status_code == 404
    assert mine.get(f"/api/v1/artifacts/{digest}").content == b"waits for its version"
    discard_uploads(application.state.database, application.state.artifacts, DEFAULT_FLEET, [digest])
    assert not application.state.artifacts.exists(digest)


def test_an_admin_of_a_fleet_can_not_become_somebody_of_another(
    application: FastAPI, alpha: dict[str, str], beta: TestClient
) -> None:
    wide = client(application, ADMIN, **{"X-Shoal-Fleet": "beta"})
    assert wide.patch("/api/v1/users/alpha-user", json={"role": "viewer"}).status_code == 200
    taken = beta.patch("/api/v1/users/alpha-user", json={"password": "another password"})
    assert (taken.status_code, taken.json()["code"]) == (403, "user_of_other_fleets")
    assert beta.delete("/api/v1/users/alpha-user").status_code == 204
    assert client(application, ADMIN).get("/api/v1/users").json()["items"][0]["name"] == "alpha-user"
    assert beta.get("/api/v1/users").json()["items"] == []


def test_a_fleet_has_signing_keys_of_its_own(application: FastAPI, beta: TestClient) -> None:
    mine = client(application, ADMIN)
    roots = []
    for api in (mine, beta):
        assert api.get("/api/v1/trust").status_code == 200
        root = api.get("/api/v1/trust/metadata/root.json").json()["signed"]
        roots.append({keyid for role in root["roles"].values() for keyid in role["keyids"]})
    assert all(roots)
    assert not roots[0] & roots[1]
