"""A runtime that a package brings: the device reports it, a profile asks for it, its worker serves with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests import vendor_runtime
from tests.fleet import LocalFleet, wait_until, write_classifier, write_data


def test_a_vendors_runtime_serves_the_source_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vendor_runtime.install(tmp_path, monkeypatch)
    (tmp_path / "fleet").mkdir()
    fleet = LocalFleet(tmp_path / "fleet")
    try:
        fleet.start_server()
        fleet.start_agent("dev-1")
        match = {"runtimes.acme-npu.package": "acme-runtime", "runtimes.acme-npu.providers": "npu"}
        profile = {"name": "acme", "match": match, "runtime": "acme-npu", "providers": ["npu"], "precisions": ["fp32"]}
        wait_until("the device", lambda: fleet.get("/devices")["items"])
        fleet.post("/profiles", profile)
        wait_until("the device", lambda: [d for d in fleet.get("/devices")["items"] if d["profile"] == "acme"])
        path, data = fleet.folder / "m.onnx", fleet.folder / "data.npz"
        write_classifier(path)
        write_data(data, rows=32, seed=1)
        fleet.push("m", "1", path)
        variant = fleet.build("m@1", "acme")[0]
        assert variant["state"] == "ready", variant
        assert [one["recipe"] for one in variant["candidates"]] == ["as-is"]
        assert variant["candidates"][0]["measurements"]["provider"] == "cpu, not by acme-npu"
        rollout = fleet.rollout("m@1")
        wait_until("m@1", lambda: fleet.rollout_state(rollout) == "succeeded")
        (served,) = fleet.get("/devices/dev-1")["serving"]
        assert (served["runtime"], served["provider"], served["fell_back"]) == ("acme 3.1", "npu", "")
        assert fleet.infer("dev-1", "m", np.eye(8, dtype=np.float32)[:1])["model_version"] == "1"
    finally:
        fleet.stop()
