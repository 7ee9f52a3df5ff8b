"""A server that was lost and restored from an older backup: its devices go on, with what they have seen since."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from tests.fleet import BIN, LocalFleet, wait_until, write_classifier

ROW = np.eye(8, dtype=np.float32)[1:2]


def admin(fleet: LocalFleet, *arguments: str, **variables: str) -> dict[str, Any]:
    environment = {**os.environ, "SHOAL_STATE_DIR": str(fleet.folder / "server"), "NO_COLOR": "1", **variables}
    done = subprocess.run(
        [str(BIN / "shoal"), "admin", *arguments, "-o", "json"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_devices_follow_a_server_that_was_restored(tmp_path: Path) -> None:
    fleet = LocalFleet(tmp_path, tls=True)
    try:
        fleet.start_server()
        assert fleet.enroll("dev-1").returncode == 0
        fleet.start_agent("dev-1")
        wait_until("the device", lambda: fleet.get("/devices")["items"])
        fleet.post("/profiles", {"name": "any", "match": {}, "runtime": "onnx", "precisions": ["fp32"]})

        def build(model: str, version: str) -> None:
            write_classifier(tmp_path / "net.onnx", seed=int(version))
            fleet.push(model, version, tmp_path / "net.onnx")
            assert fleet.build(f"{model}@{version}", "any")[0]["state"] == "ready"

        def roll_out(reference: str) -> None:
            rollout = fleet.rollout(reference)
            wait_until(reference, lambda: fleet.rollout_state(rollout) == "succeeded")

        def served() -> dict[str, str]:
            """By what the device itself answers: what a restored server knows of it was true once."""
            version = fleet.infer("dev-1", "m", ROW)["model_version"]
            reported = {one["model"]: one["version"] for one in fleet.get("/devices/dev-1")["serving"]}
            return reported if reported == {"m": version} else {}

        build("m", "1")
        build("m", "2")
        roll_out("m@1")
        made = admin(fleet, "backup", "--out", str(tmp_path / "backups"))
        assert made["missing"] == 0
        roll_out("m@2")  # what the backup does not know
        assert served() == {"m": "2"}
        fleet.kill("server")
        shutil.rmtree(tmp_path / "server")
        restored = admin(fleet, "restore", made["folder"], "--yes")
        assert restored["rows"] == made["rows"]
        fleet.start_server()
        wait_until("what it served then", lambda: served() == {"m": "1"})
        roll_out("m@2")
        assert served() == {"m": "2"}
        assert fleet.infer("dev-1", "m", ROW)["model_version"] == "2"
    finally:
        fleet.stop()
