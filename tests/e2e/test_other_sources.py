"""The same chunks by other ways: HTTPS where MQTT brings none, a peer by mutual TLS, a bundle without a link."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleet_server.cli.main import app
from tests.cli import CliRunner
from tests.fleet import AGENT, LocalFleet, free_port, wait_until, write_classifier

# What carries chunks is neither read nor written; everything else is.
NO_CHUNKS = "topic readwrite #\ntopic deny shoal/v1/b/#\ntopic deny shoal/v1/+/d/+/b/#\n"
PROFILE = {"name": "any", "match": {}, "runtime": "onnx", "precisions": ["fp32"]}
ROWS = np.eye(8, dtype=np.float32)[:3]


def ready(fleet: LocalFleet, version: str, *, seed: int = 0) -> None:
    write_classifier(fleet.folder / f"{version}.onnx", seed=seed, hidden=400)
    fleet.push("m", version, fleet.folder / f"{version}.onnx")
    assert fleet.build(f"m@{version}", "any")[0]["state"] == "ready"


def answers(fleet: LocalFleet, agent: str) -> list[int]:
    found = fleet.infer(agent, "m", ROWS)["outputs"][0]["data"]
    return list(np.array(found).reshape(3, 3).argmax(1))


def answers_by_now(fleet: LocalFleet, agent: str) -> list[int]:
    """Nothing while the model is not loaded: the API is up before it."""
    with contextlib.suppress(AssertionError):
        return answers(fleet, agent)
    return []


def serves(fleet: LocalFleet, agent: str, version: str) -> bool:
    found = fleet.get(f"/devices/{agent}")
    return [one["version"] for one in found["serving"]] == [version]


def everything(fleet: LocalFleet, row: dict[str, Any]) -> int:
    """Bytes of what a deployment fetches: the artifact, and its golden inputs."""
    variant = fleet.get(f"/variants/{row['variant_id']}")
    (golden,) = [one["golden"]["size"] for one in variant["candidates"] if one["digest"] == variant["digest"]]
    return int(row["artifact_bytes"] + golden)


def test_a_device_fetches_by_https_what_mqtt_does_not_bring(tmp_path: Path) -> None:
    fleet = LocalFleet(tmp_path, external_broker=True)
    try:
        fleet.start_broker(acl=NO_CHUNKS)
        fleet.start_server(SHOAL_DOWNLOAD_URL=fleet.url)
        fleet.start_agent("b")  # as the part of a topic is called
        fleet.post("/profiles", PROFILE)
        wait_until("the device", lambda: [one for one in fleet.get("/devices")["items"] if one["profile"]])
        ready(fleet, "1")
        rollout = fleet.rollout("m@1")
        wait_until("the rollout", lambda: fleet.rollout_state(rollout) == "succeeded")
        (row,) = fleet.deployments(rollout)
        assert row["sources"] == {"https": everything(fleet, row)}
        assert answers(fleet, "b") == [0, 1, 2]
    finally:
        fleet.stop()


def test_a_second_device_fetches_from_the_first(tmp_path: Path) -> None:
    fleet = LocalFleet(tmp_path, tls=True)
    port = free_port()
    try:
        fleet.start_server()
        fleet.post("/profiles", PROFILE)
        for name, tables in (
            ("one", f'[peers]\nserve = true\nlisten = "127.0.0.1:{port}"\n'),
            ("two", f'[peers]\nat = ["127.0.0.1:{port}"]\n'),
        ):
            assert fleet.enroll(name).returncode == 0
            fleet.start_agent(name, tables=tables)
        wait_until("both", lambda: len([one for one in fleet.get("/devices")["items"] if one["profile"]]) == 2)
        ready(fleet, "1")
        for name, source in (("one", "mqtt"), ("two", f"peer 127.0.0.1:{port}")):
            rollout = fleet.rollout("m@1", target={"devices": [name]})
            wait_until("the rollout", lambda one=rollout: fleet.rollout_state(one) == "succeeded")
            (row,) = fleet.deployments(rollout)
            assert row["sources"] == {source: everything(fleet, row)}
            assert answers(fleet, name) == [0, 1, 2]
    finally:
        fleet.stop()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"))
    try:
        fleet.start_server()
        fleet.post("/profiles", PROFILE)
        yield fleet
    finally:
        fleet.stop()


def shoal(fleet: LocalFleet, *arguments: str, status: int = 0) -> str:
    environment = {"SHOAL_TOKEN": fleet.token, "COLUMNS": "100", "NO_COLOR": "1"}
    done = CliRunner().invoke(app, ["--url", fleet.url, *arguments], env=environment)
    assert done.exit_code == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def export(fleet: LocalFleet, version: str) -> bytes:
    path = fleet.folder / f"{version}.shoal-bundle"
    options = ("--profile", "any", "--allow-unproven", "--probation", "1", "--out", str(path))
    shoal(fleet, "bundle", "export", f"m@{version}", *options)
    return path.read_bytes()


def test_a_bundle_is_all_that_an_offline_device_needs(fleet: LocalFleet) -> None:
    ready(fleet, "1")
    ready(fleet, "2", seed=1)
    media = fleet.folder / "media"
    media.mkdir()
    root = fleet.folder / "root.json"
    root.write_text(shoal(fleet, "trust", "root"))
    first, second = export(fleet, "1"), export(fleet, "2")

    # A stick is put in: the device runs what its order says, though it has never heard of a server.
    tables = f"[bundles]\noffline = true\nfolder = {json.dumps(str(media))}\n"
    nowhere = free_port()
    tables_with_root = f"root_file = {json.dumps(str(root))}\n{tables}"
    fleet.start_agent("off", tables=tables_with_root, broker_port=nowhere)
    (media / "a.shoal-bundle").write_bytes(first)
    wait_until("version 1", lambda: "m@1 is active" in fleet.log("off"))
    assert answers(fleet, "off") == [0, 1, 2]

    # One whose order was changed: it goes on with what it runs.
    changed = second.replace(b'"probation_s":1.0', b'"probation_s":2.0')
    assert changed != second
    (media / "a.shoal-bundle").write_bytes(changed)
    wait_until("the refusal", lambda: "is refused (untrusted)" in fleet.log("off"))
    assert answers(fleet, "off") == [0, 1, 2]

    # The next one, by hand: copied into the state folder.
    configured = str(fleet.folder / "off.toml")
    done = subprocess.run(
        [*AGENT, "bundle", "import", str(fleet.folder / "2.shoal-bundle"), "--config", configured],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "holds 2 artifacts" in done.stdout
    wait_until("version 2", lambda: "m@2 is active" in fleet.log("off"))

    # An old stick takes it back to nothing, also after a power cut.
    fleet.kill("off")
    (media / "a.shoal-bundle").write_bytes(first)
    starts = fleet.log("off").count("device off")
    fleet.start_agent("off")
    wait_until("what it ran", lambda: answers_by_now(fleet, "off") == [0, 1, 2])
    wait_until("the rest of the agent", lambda: fleet.log("off").count("device off") > starts)
    since = fleet.log("off").rpartition("device off")[2]
    assert "m@1 is" not in since
    assert "is refused" not in since, "an order older than the one that was carried out is not even tried"

    # A link at last: the server is told what runs, and is not confused by a deployment that it never made.
    fleet.kill("off")
    (fleet.folder / "off.toml").write_text(
        (fleet.folder / "off.toml").read_text().replace(str(nowhere), str(fleet.broker_port))
    )
    fleet.start_agent("off")
    wait_until("the report", lambda: any(one["id"] == "off" for one in fleet.get("/devices")["items"]))
    wait_until("what serves", lambda: serves(fleet, "off", "2"))
    rollout = fleet.rollout("m@1", target={"devices": ["off"]})
    wait_until("the rollout", lambda: fleet.rollout_state(rollout) == "succeeded")
    assert serves(fleet, "off", "1")
