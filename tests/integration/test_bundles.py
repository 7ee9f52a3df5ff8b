"""Orders to devices without a server: what is in them, who signs them, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from agent.protocol.bundle import read_order
from agent.protocol.limits import LIMITS
from agent.protocol.messages import Reported, TrustPiece
from agent.protocol.version import SPOKEN
from agent.update.trust import PieceFetcher, TrustClient
from fleet_server.app import create_app, running
from fleet_server.clock import utc_now
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.settings import Settings
from fleet_server.trust import service as trust
from tests.integration.test_api import facts
from tests.integration.test_audit import make_ready, rollout_body
from tests.integration.test_tenants import ADMIN, Inspector, client, created
from tests.reporting import record_report


@pytest.fixture
def application(tmp_path: Path) -> Iterator[FastAPI]:
    settings = Settings(
        state_dir=tmp_path / "state", broker_url="mqtt://127.0.0.1:1", conversion_workers=0, admin_token=ADMIN
    )
    app = create_app(settings)
    with running(app):
        app.state.inspector = Inspector()
        yield app


@pytest.fixture
def api(application: FastAPI) -> TestClient:
    """With two versions of a model for one profile."""
    api = client(application, ADMIN)
    created(api.post("/api/v1/profiles", json={"name": "p", "runtime": "onnx"}))
    for version in ("1", "2"):
        digest = created(api.post("/api/v1/uploads", content=b"weights" + version.encode()))["digest"]
        body = {"name": version, "sources": [{"format": "onnx", "digest": digest}], "evaluation": digest}
        created(api.post("/api/v1/models/m/versions", json=body))
        wanted = {"version": f"m@{version}", "profiles": ["p"]}
        variant = created(api.post("/api/v1/variants", json=wanted))[0]["id"]
        make_ready(application.state.database, variant, digest)
    return api


def order(api: TestClient, *versions: str, status: int = 201, **fields: Any) -> Any:
    answer = api.post("/api/v1/bundles", json={"versions": list(versions), "allow_unproven": True, **fields})
    assert answer.status_code == status, answer.text
    return answer.json()


def vouches(folder: Path, found: Any) -> None:
    """A device with the first root alone believes the order and its manifests, by what is in the answer."""
    files = {one["file"]: one["body"].encode() for one in found["metadata"]}

    def ask(name: str, offset: int) -> TrustPiece:
        body = files.get(name, b"")
        if not body:
            return TrustPiece(name, offset, absent=True)
        return TrustPiece(name, offset, len(body), body[offset : offset + LIMITS.trust_piece_bytes])

    trusted = TrustClient(folder, files["1.root.json"], PieceFetcher(ask))
    trusted.refresh()
    said = read_order(found["order"].encode())
    trusted.check(said.target_path, found["order"].encode())
    assert len(said.targets) == len(found["manifests"])
    for path, manifest in zip(said.targets, found["manifests"], strict=True):
        trusted.check(path, manifest.encode())


def test_an_order_with_all_that_judges_it(api: TestClient, tmp_path: Path) -> None:
    first = order(api, "m@1", name="line-a")
    assert (first["signed"], first["serial"], first["fleet"]) == (True, 1, "default")
    vouches(tmp_path / "one", first)
    assert order(api, "m@1", name="line-a")["serial"] == 1, "the same order is the same"
    second = order(api, "m@2", name="line-a")
    assert second["serial"] == 2
    vouches(tmp_path / "one", second)
    assert [one["digest"] for one in second["artifacts"]] != [one["digest"] for one in first["artifacts"]]
    assert order(api, "m@1", name="line-b")["serial"] == 1
    events = [one for one in api.get("/api/v1/audit-events").json()["items"] if one["action"] == "bundle.create"]
    assert [one["subject"] for one in events][-1] == "bundle/line-a"


def test_what_may_not_be_rolled_out_may_not_be_ordered(api: TestClient) -> None:
    assert order(api, "m@1", status=409, allow_unproven=False)["code"] == "variant_unproven"
    assert order(api, "m@1", "m@2", status=422)["code"] == "model_twice"
    created(api.post("/api/v1/profiles", json={"name": "q", "runtime": "onnx", "match": {"arch": "x"}}))
    assert order(api, "m@1", status=409, profiles=["q"])["code"] == "no_variant_for_profile"
    assert order(api, "m@9", status=404)["code"] == "version_not_found"
    assert order(api, "m@1", status=422, name="../x")["code"] == "invalid"


def test_people_sign_orders_where_the_keys_are_theirs(api: TestClient, application: FastAPI, tmp_path: Path) -> None:
    order(api, "m@1")
    folder = trust.key_folder(application.state.settings, DEFAULT_FLEET).path
    root = api.get("/api/v1/trust/metadata/root.json").json()["signed"]
    (keyid,) = root["roles"]["targets"]["keyids"]
    (file,) = [one for one in folder.iterdir() if keyid in one.name]
    away = tmp_path / file.name
    file.rename(away)
    waits = order(api, "m@2")
    assert (waits["signed"], waits["serial"], waits["metadata"]) == (False, 2, [])
    (proposal,) = api.get("/api/v1/trust").json()["waiting"]
    assert proposal["role"] == "bundles"
    assert [one["path"] for one in proposal["manifests"]] == ["bundles/default.json"]
    away.rename(file)
    assert order(api, "m@2")["signed"]


def test_a_fleet_with_approvals_has_orders_signed_by_people(api: TestClient, application: FastAPI) -> None:
    created(api.patch("/api/v1/fleets/default", json={"approvals": 1}))
    assert order(api, "m@1", status=409)["code"] == "approvals_needed"
    with application.state.database.read() as session:
        assert trust.repository.target(session, DEFAULT_FLEET, "bundles/default.json") is None


def test_orders_change_nothing_for_devices_with_a_server(api: TestClient, application: FastAPI) -> None:
    with application.state.database.write() as session:
        record_report(session, "d", Reported(SPOKEN, "b", 1, 0, facts()), utc_now())
    order(api, "m@1")
    assert api.get("/api/v1/deployments?device=d").json()["items"] == []
    rollout = created(api.post("/api/v1/rollouts", json=rollout_body()))
    assert rollout["counts"]["total"] == 1
