"""The main job over real processes: push, convert, gate, staged rollout, inference, telemetry, refusal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from tests.fleet import LocalFleet, wait_until, write_classifier

COMPANY_MS = 20


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """A server with its embedded broker and two agents of unlike kinds, with `tri@1` built for both."""
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"), forked=False)  # from nothing, as everywhere else
    try:
        fleet.start_server(SHOAL_DELTAS="true")
        fleet.start_agent("gate-1", kind="gateway")
        fleet.start_agent("cam-1", kind="camera")
        for name, kind, precision in (("gateways", "gateway", "fp32"), ("cameras", "camera", "int8")):
            profile = {"name": name, "match": {"tags.kind": kind}, "runtime": "onnx", "precisions": [precision]}
            profile["budgets"] = {"accuracy_drop_points": 5}
            profile["scheduling"] = {"batch_wait_ms": COMPANY_MS if kind == "camera" else 0}
            fleet.post("/profiles", profile)
        source = fleet.folder / "tri.onnx"
        write_classifier(source)
        fleet.push("tri", "1", source)
        wait_until("both devices", lambda: len([d for d in fleet.get("/devices")["items"] if d["profile"]]) == 2)
        yield fleet
    finally:
        fleet.stop()


def test_the_whole_loop(fleet: LocalFleet) -> None:
    variants = fleet.build("tri@1", "gateways", "cameras")
    assert [variant["state"] for variant in variants] == ["ready", "ready"], variants
    assert all(variant["lineage"]["source_digest"] for variant in variants)

    strategy = {"stages": [{"percent": 50, "soak_s": 0.5}, {"percent": 100}]}
    rollout = fleet.rollout("tri@1", strategy=strategy)
    wait_until("the rollout", lambda: fleet.rollout_state(rollout) == "succeeded")
    deployments = fleet.deployments(rollout)
    assert sorted(deployment["stage"] for deployment in deployments) == [0, 1]
    assert all(deployment["received_bytes"] >= deployment["artifact_bytes"] for deployment in deployments)

    rows = np.random.default_rng(3).standard_normal((50, 8)).astype(np.float32)
    truth = rows[:, :3].argmax(1)
    for agent, port in fleet.agent_ports.items():
        answers = [np.argmax(fleet.infer(agent, "tri", row[None])["outputs"][0]["data"]) for row in rows]
        assert np.mean(answers == truth) > 0.9
        body = {
            "id": "labelled",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [50, 8], "data": rows.flatten().tolist()}],
        }
        base = f"http://127.0.0.1:{port}/v2/models/tri"
        assert httpx.post(f"{base}/infer", json=body).status_code == 200
        told = httpx.post(f"{base}/feedback", json={"labels": [{"id": "labelled", "label": truth.tolist()}]})
        assert told.status_code == 200, told.text

    def heard() -> list[dict[str, Any]] | None:
        found = fleet.get("/telemetry/models", model="tri", version="1")
        rows = found["items"] if isinstance(found, dict) else found
        done = [row for row in rows if row["labelled"] == 50 and row["requests"] >= 51]
        return done if len(done) == 2 else None

    telemetry = wait_until("telemetry of both devices", heard, 30)
    for row in telemetry:
        assert row["accuracy"] > 0.9
        assert row["latency_p50_ms"] > 0
        assert row["errors"] == 0
    slowest = max(row["latency_p50_ms"] for row in telemetry)
    assert slowest > 0.9 * COMPANY_MS, "the camera's lone requests wait for company (a bucket is some per cent wide)"


def test_a_broken_version_is_refused_and_the_devices_go_on(fleet: LocalFleet) -> None:
    broken = fleet.folder / "broken.onnx"
    write_classifier(broken, right=False)
    fleet.push("tri", "2", broken)
    variants = fleet.build("tri@2", "gateways", "cameras")
    for variant in variants:
        assert variant["state"] == "refused", variant
        failed = [check["name"] for check in variant["gate"]["checks"] if not check["holds"]]
        assert "regression" in failed
    refusal = fleet.post("/rollouts", {"version": "tri@2", "target": {"all": True}}, status=409)
    assert refusal["code"] == "no_variant_for_profile"
    assert "cameras" in refusal["detail"]
    assert fleet.infer("cam-1", "tri", np.zeros((1, 8), np.float32))["model_version"] == "1"


def test_a_flipped_byte_never_serves(fleet: LocalFleet) -> None:
    other = fleet.folder / "other.onnx"
    write_classifier(other, seed=9)
    fleet.push("tri", "3", other)
    (variant,) = fleet.build("tri@3", "gateways")
    assert variant["state"] == "ready", variant
    stored = [
        path for path in (fleet.folder / "server" / "artifacts").rglob(f"*{variant['digest']}*") if path.is_file()
    ]
    assert len(stored) == 1
    content = bytearray(stored[0].read_bytes())
    content[len(content) // 2] ^= 1
    stored[0].write_bytes(content)
    rollout = fleet.rollout("tri@3", target={"devices": ["gate-1"]})
    (deployment,) = wait_until("the refusal", lambda: [d for d in fleet.deployments(rollout) if d["failure"]], 60)
    assert deployment["failure"]["code"] == "digest_mismatch"
    assert fleet.infer("gate-1", "tri", np.zeros((1, 8), np.float32))["model_version"] == "1"
