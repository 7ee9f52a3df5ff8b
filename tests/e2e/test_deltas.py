"""A device that holds a version gets the next one as a difference; a damaged one falls back. Over real MQTT."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from agent.protocol.delta import DELTA
from tests.fleet import LocalFleet, wait_until, write_classifier

HIDDEN = 400  # 640 KB of weights


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """A server, two agents that serve m@1, and versions 2 and 3, in each of which 2 % of the weights are others."""
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"))
    try:
        fleet.start_server(SHOAL_DELTAS="true")
        for name in ("dev-a", "dev-b"):
            fleet.start_agent(name)
        fleet.post("/profiles", {"name": "any", "match": {}, "runtime": "onnx", "precisions": ["fp32"]})
        wait_until("the devices", lambda: len([d for d in fleet.get("/devices")["items"] if d["profile"]]) == 2)
        write_classifier(fleet.folder / "1.onnx", hidden=HIDDEN)
        for version in (2, 3):
            change(fleet.folder / f"{version - 1}.onnx", fleet.folder / f"{version}.onnx", seed=version)
        for version in ("1", "2", "3"):
            fleet.push("m", version, fleet.folder / f"{version}.onnx")
            assert fleet.build(f"m@{version}", "any")[0]["state"] == "ready"
        first = fleet.rollout("m@1")
        wait_until("m@1", lambda: fleet.rollout_state(first) == "succeeded")
        yield fleet
    finally:
        fleet.stop()


GOLDEN = 256 * 1024  # bytes of golden inputs, at most
ZSTD_FRAME = b"\x28\xb5\x2f\xfd"


def change(old: Path, new: Path, *, seed: int) -> None:
    rng = np.random.default_rng(seed)
    net = onnx.load(old)
    middle = next(one for one in net.graph.initializer if one.name == "middle")
    weights = numpy_helper.to_array(middle).copy()
    where = rng.random(weights.shape) < 0.02
    weights[where] += rng.standard_normal(int(where.sum())).astype(np.float32) * 1e-6
    middle.CopyFrom(numpy_helper.from_array(weights, "middle"))
    onnx.save(net, new)


def artifact_of(fleet: LocalFleet, version: str) -> bytes:
    variant = fleet.get("/variants", version=f"m@{version}")["items"][0]
    return stored(fleet, variant["digest"]).read_bytes()


def stored(fleet: LocalFleet, digest: str) -> Path:
    return fleet.folder / "server" / "artifacts" / digest[:2] / digest


def row(fleet: LocalFleet, rollout: str, device: str) -> dict[str, Any]:
    return next(one for one in fleet.deployments(rollout) if one["device_id"] == device)


def test_the_next_version_comes_as_a_difference(fleet: LocalFleet) -> None:
    wait_until("what they hold", lambda: fleet.get("/devices/dev-a")["serving"])
    rollout = fleet.rollout("m@2")
    wait_until("m@2", lambda: fleet.rollout_state(rollout) == "succeeded")
    artifact = artifact_of(fleet, "2")
    for device in ("dev-a", "dev-b"):
        found = row(fleet, rollout, device)
        assert found["encoding"] == DELTA
        assert 0 < found["received_bytes"] < 0.1 * len(artifact), fleet.log(device)[-3000:]
        digest = hashlib.sha256(artifact).hexdigest()
        assert (fleet.folder / device / "artifacts" / digest).read_bytes() == artifact
        wait_until("the encoding to go", partial(holds_no_encoding, fleet, device), 20)


def holds_no_encoding(fleet: LocalFleet, device: str) -> bool:
    """What is there was made of it, is what it can go back to, or golden inputs."""
    heads = [path.read_bytes()[:4] for path in (fleet.folder / device / "artifacts").iterdir()]
    return ZSTD_FRAME not in heads


def test_a_damaged_difference_is_tried_once_and_the_artifact_comes_as_it_is(fleet: LocalFleet) -> None:
    fleet.kill("dev-b")
    rollout = fleet.rollout("m@3")
    wait_until("m@3 on dev-a", lambda: row(fleet, rollout, "dev-a")["phase"] == "active")
    assert row(fleet, rollout, "dev-a")["encoding"] == DELTA
    artifacts = {hashlib.sha256(artifact_of(fleet, version)).hexdigest() for version in ("1", "2", "3")}
    spoilt = {}

    def spoil() -> None:
        """Those too that are made meanwhile, to other artifacts that the device holds."""
        for path in (fleet.folder / "server" / "artifacts").rglob("*"):
            if is_encoding(path, artifacts):
                spoilt[path] = path.stat().st_size
                path.write_bytes(os.urandom(spoilt[path]))

    def arrived() -> bool:
        spoil()
        return bool(row(fleet, rollout, "dev-b")["phase"] == "active")

    fleet.kill("server")  # it has chunks in memory that were read before
    spoil()
    assert spoilt
    fleet.start_server(SHOAL_DELTAS="true")
    fleet.start_agent("dev-b")
    wait_until("m@3 on dev-b", arrived)
    found, whole = row(fleet, rollout, "dev-b"), len(artifact_of(fleet, "3"))
    assert found["encoding"] == ""
    assert whole < found["received_bytes"] <= 1.02 * (whole + sum(spoilt.values())) + GOLDEN
    assert "other bytes came than those of its digest" in fleet.log("dev-b")
    wait_until("the end", lambda: fleet.rollout_state(rollout) == "succeeded")


def is_encoding(path: Path, artifacts: set[str]) -> bool:
    return path.is_file() and path.name not in artifacts and path.read_bytes()[:4] == ZSTD_FRAME
