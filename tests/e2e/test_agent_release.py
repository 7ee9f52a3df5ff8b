"""A release of the agent: pushed, signed, rolled out by stages to a device that becomes it, and taken back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import paho.mqtt.publish as publish
import pytest

from agent.protocol.codec import encode
from agent.protocol.limits import LIMITS
from agent.protocol.messages import DesiredState
from agent.protocol.release import DesiredRelease
from agent.protocol.topics import DeviceTopic, device_topic
from agent.protocol.version import SPOKEN
from agent.releases.book import ReleaseBook
from agent.releases.releases import NOTE
from agent.update.journal import Journal
from tests.fleet import LocalFleet, wait_until
from tests.self_updating import BAD, Bundles, manifest

LAUNCHER = (sys.executable, "-m", "agent.launcher")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    return Bundles(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[LocalFleet]:
    fleet = LocalFleet(tmp_path)
    try:
        fleet.start_server(SHOAL_AGENT_CONFIRM_S="20")
        fleet.start_agent("dev-1", program=LAUNCHER)
        fleet.start_agent("dev-2", program=LAUNCHER, tables='self_update = "off"\n')
        wait_until("the devices", lambda: len([one for one in fleet.get("/devices")["items"] if one["online"]]) == 2)
        yield fleet
    finally:
        fleet.stop()


def version(fleet: LocalFleet, device: str) -> str:
    return str(fleet.get(f"/devices/{device}")["facts"]["agent_version"])


def test_a_device_becomes_a_release_and_goes_back(fleet: LocalFleet, bundles: Bundles) -> None:
    body = {"digest": fleet.upload(bundles.good)}
    pushed = fleet.post("/agent-releases", body)
    assert pushed["reference"] == "shoal-agent@9.0.0"
    assert [one["signed"] for one in pushed["bundles"]] == [True]
    assert fleet.post("/agent-releases", body) == pushed
    assert fleet.get("/models")["items"] == []
    assert fleet.get("/profiles")["items"] == []

    preview = fleet.post("/rollouts/dry-run", {"version": "shoal-agent@9.0.0", "target": {"all": True}}, status=200)
    assert [(one["code"], one["devices"]) for one in preview["problems"]] == [("no_self_update", ["dev-2"])]
    stages = {"stages": [{"percent": 100, "soak_s": 3600}]}
    rollout = fleet.rollout("shoal-agent@9.0.0", strategy=stages)
    wait_until("the release", lambda: [one["phase"] for one in fleet.deployments(rollout)] == ["active"], 120)
    assert version(fleet, "dev-1") == "9.0.0"
    assert version(fleet, "dev-2") != "9.0.0"
    assert "dev-2" in fleet.get(f"/rollouts/{rollout}")["verdicts"][0]["reason"]
    assert fleet.get("/agent-releases/9.0.0")["devices"] == 1
    assert fleet.api.delete("/agent-releases/9.0.0").json()["code"] == "version_in_use"

    fleet.post(f"/rollouts/{rollout}/abort", {"revert": True}, status=200)
    wait_until("what is installed", lambda: version(fleet, "dev-1") != "9.0.0", 120)
    wait_until("the end", lambda: fleet.rollout_state(rollout) == "reverted")
    unsigned(fleet, bundles)


@pytest.mark.slow
def test_a_rollout_of_a_release_that_crashes_is_reverted(fleet: LocalFleet, bundles: Bundles) -> None:
    crashing = fleet.post("/agent-releases", {"digest": fleet.upload(bundles.bad("crashes", *BAD["crashes"]))})
    rollout = fleet.rollout(crashing["reference"])
    wait_until("its end", lambda: fleet.rollout_state(rollout) in {"reverted", "stopped"}, 120)
    found = fleet.deployments(rollout)[-1]
    assert found["phase"] == "rolled_back"
    assert found["failure"]["code"] == "release_failed"
    assert "ended with 3" in found["failure"]["detail"]
    assert version(fleet, "dev-1") != "9.0.1"


def unsigned(fleet: LocalFleet, bundles: Bundles) -> None:
    """Somebody who can publish sends a release that nobody has signed."""
    true = manifest(bundles.good)
    forged = msgspec.structs.replace(true, info=msgspec.structs.replace(true.info, version="9.9.9"))
    wanted = DesiredRelease("forged", msgspec.Raw(msgspec.json.encode(forged)))
    state = DesiredState(SPOKEN, "default", revision=LIMITS.counter - 1, agent=wanted)  # beyond it the server can't go
    topic = device_topic("dev-1", DeviceTopic.DESIRED)
    publish.single(topic, encode(state), qos=1, hostname="127.0.0.1", port=fleet.broker_port)

    def refused() -> str | None:
        journal = Journal(fleet.folder / "dev-1" / "journal.db")
        try:
            record = ReleaseBook(journal.note(NOTE)).records.get("forged")
        finally:
            journal.close()
        return record.failure.code.value if record is not None and record.failure is not None else None

    assert wait_until("a refusal", refused) == "unsigned"
    assert version(fleet, "dev-1") != "9.9.9"
