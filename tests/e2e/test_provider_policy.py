"""A profile that wants a GPU first, on a machine whose runtime has none: what each policy makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.fleet import LocalFleet, wait_until, write_classifier

ROW = np.eye(8, dtype=np.float32)[:1]


@pytest.fixture
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """A device, and three versions for a profile that wants CUDA first."""
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"))
    try:
        fleet.start_server(SHOAL_WEBHOOK_ALLOW_PRIVATE="true")
        fleet.start_agent("dev-1")
        profile = {"name": "gpu", "match": {}, "runtime": "onnx", "providers": ["cuda"], "precisions": ["fp32"]}
        fleet.post("/profiles", profile)
        wait_until("the device", lambda: [d for d in fleet.get("/devices")["items"] if d["profile"]])
        for version in ("1", "2", "3"):
            path = fleet.folder / f"{version}.onnx"
            write_classifier(path, seed=int(version))
            fleet.push("m", version, path)
            assert fleet.build(f"m@{version}", "gpu")[0]["state"] == "ready"
        yield fleet
    finally:
        fleet.stop()


def serving(fleet: LocalFleet) -> list[dict[str, Any]]:
    return list(fleet.get("/devices/dev-1")["serving"])


def roll_out(fleet: LocalFleet, reference: str, policy: str, *, ends: str, **strategy: Any) -> dict[str, Any]:
    """A rollout under a policy, waited for; its deployment."""
    made = fleet.rollout(
        reference,
        strategy={
            "stages": [{"percent": 100}],
            "stop_when": [],
            "probation": {"on_provider_missing": policy, "seconds": 1},
            **strategy,
        },
    )
    wait_until(f"{reference} with {policy}", lambda: fleet.rollout_state(made) == ends)
    return next(one for one in fleet.deployments(made) if one["version"] == reference.partition("@")[2])


def test_each_policy_where_there_is_no_gpu(fleet: LocalFleet) -> None:
    hook = {"url": "http://127.0.0.1:9/", "types": ["shoal.deployment.fell_back"]}
    fleet.post("/webhooks", hook)

    refused = roll_out(fleet, "m@1", "refuse", ends="stopped")
    assert refused["phase"] == "failed"
    assert refused["failure"]["code"] == "provider_unavailable"
    assert "cuda: this build of onnxruntime" in refused["failure"]["detail"]
    assert serving(fleet) == []

    first = roll_out(fleet, "m@1", "keep_old", ends="succeeded")
    assert first["phase"] == "active", "nothing served, so there was nothing to keep"
    assert first["fell_back"].startswith("cuda: ")
    assert "it runs on cpu, because of cuda: " in first["probation"]["note"]
    (served,) = serving(fleet)
    assert (served["version"], served["provider"], served["fell_back"]) == ("1", "cpu", first["fell_back"])

    for policy in ("keep_old", "refuse"):
        kept = roll_out(fleet, "m@2", policy, ends="stopped")
        assert (kept["phase"], kept["failure"]["code"]) == ("failed", "provider_unavailable")
        assert fleet.infer("dev-1", "m", ROW)["model_version"] == "1"

    rule = {"metric": "fell_back_percent", "above": 5}
    fell = roll_out(fleet, "m@3", "fall_back", ends="reverted", stop_when=[rule], on_stop="revert")
    assert fell["fell_back"].startswith("cuda: ")
    assert fleet.infer("dev-1", "m", ROW)["model_version"] == "1"

    told = [one["subject"] for one in fleet.get("/webhook-deliveries")["items"]]
    assert len(told) == len(set(told)), "once a deployment"
    assert {f"deployment/{first['id']}", f"deployment/{fell['id']}"} <= set(told)
    assert f"deployment/{refused['id']}" not in told
