"""Delivery policies over a real broker: devices stop at their budget, say so, and go on when they may."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fleet import LocalFleet, wait_until, write_classifier

DEVICES = ("dev-a", "dev-b", "dev-c")
BUDGET = 1_000_000


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """A server, three agents whose link is said to be cellular, and two versions of 2 MB."""
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SHOAL_AGENT_LINK", '{ type = "cellular" }')
        try:
            fleet.start_server(SHOAL_DELTAS="false")  # budgets are of the whole artifact
            for name in DEVICES:
                fleet.start_agent(name)
            fleet.post("/profiles", {"name": "any", "match": {}, "runtime": "onnx", "precisions": ["fp32"]})
            wait_until("devices", lambda: len([d for d in fleet.get("/devices")["items"] if d["profile"]]) == 3)
            for version in ("1", "2"):
                write_classifier(fleet.folder / f"{version}.onnx", seed=int(version), hidden=700)
                fleet.push("m", version, fleet.folder / f"{version}.onnx")
                assert fleet.build(f"m@{version}", "any")[0]["state"] == "ready"
            yield fleet
        finally:
            fleet.stop()


def change(fleet: LocalFleet, delivery: dict[str, Any] | None) -> None:
    answer = fleet.api.patch("/profiles/any", json={"delivery": delivery})
    assert answer.status_code == 200, answer.text
    assert answer.json()["delivery"] is None or delivery


def waiting(fleet: LocalFleet, rollout: str, reason: str) -> list[dict[str, Any]] | None:
    rows = fleet.deployments(rollout)
    said = [row for row in rows if row["waiting"] and row["waiting"]["reason"] == reason]
    return rows if len(said) == len(DEVICES) else None


def test_devices_stop_at_their_budget_say_so_and_go_on_when_it_is_lifted(fleet: LocalFleet) -> None:
    rollout = fleet.rollout("m@1", delivery={"budgets": {"metered": "100 MB per day", "cellular": "1 MB per day"}})
    rows = wait_until("the budget", lambda: waiting(fleet, rollout, "budget"))
    for row in rows:
        assert row["phase"] == "downloading"
        assert 0 < row["received_bytes"] <= BUDGET
        assert "1 MB per day" in row["waiting"]["detail"]
        assert dt.datetime.fromisoformat(row["waiting"]["until"]) > dt.datetime.now(dt.UTC)
    assert fleet.get(f"/rollouts/{rollout}")["counts"]["waiting"] == 3
    shown = fleet.get("/devices/dev-a")
    assert shown["facts"]["link"] == {"type": "cellular", "metered": True, "interface": ""}
    assert [one["model"] for one in shown["waiting"]] == ["m"]

    fleet.kill("dev-a")
    fleet.start_agent("dev-a")
    wait_until("dev-a", lambda: fleet.get("/devices/dev-a")["online"])
    rows = wait_until("the budget again", lambda: waiting(fleet, rollout, "budget"))
    assert all(row["received_bytes"] <= BUDGET for row in rows)

    fleet.post(f"/rollouts/{rollout}/abort", {}, status=200)
    again = fleet.rollout("m@1", on_busy="supersede")
    wait_until("m@1", lambda: fleet.rollout_state(again) == "succeeded")
    assert fleet.get(f"/rollouts/{again}")["counts"]["waiting"] == 0


def test_windows_of_a_profile_hold_until_they_are_changed(fleet: LocalFleet) -> None:
    now = dt.datetime.now(dt.UTC)
    start, end = now + dt.timedelta(hours=6), now + dt.timedelta(hours=7)
    closed = f"{start:%H:%M}-{end:%H:%M} UTC"
    change(fleet, {"activate": [closed], "download": [closed]})
    rollout = fleet.rollout("m@2")
    rows = wait_until("the download window", lambda: waiting(fleet, rollout, "download_window"))
    assert all(row["received_bytes"] == 0 for row in rows)
    change(fleet, {"activate": [closed]})
    rows = wait_until("the activation window", lambda: waiting(fleet, rollout, "activate_window"))
    for row in rows:
        assert row["phase"] == "verifying"
        assert closed in row["waiting"]["detail"]
        until = dt.datetime.fromisoformat(row["waiting"]["until"])
        assert until == start.replace(second=0, microsecond=0)
        assert fleet.get(f"/devices/{row['device_id']}")["serving"][0]["version"] == "1"
    change(fleet, None)
    wait_until("m@2", lambda: fleet.rollout_state(rollout) == "succeeded")


@pytest.mark.parametrize(
    ("delivery", "field", "remedy"),
    [
        ({"rate": "fast"}, "delivery.rate", "such as 500 kB/s"),
        ({"budgets": {"cellular": "lots"}}, "delivery.budgets", "cellular: 'lots' is not a budget such as"),
        ({"budgets": {"radio": "1 MB per day"}}, "delivery.budgets", "there are ethernet, wifi, cellular, metered"),
        ({"download": ["night"]}, "delivery.download", "such as Mon-Fri 22:00-04:00 Europe/Berlin"),
        ({"activate": ["01:00-02:00 Mars/Olympus"]}, "delivery.activate", "no time zone 'Mars/Olympus'"),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(
    fleet: LocalFleet, delivery: dict[str, Any], field: str, remedy: str, tmp_path: Path
) -> None:
    answer = fleet.api.patch("/profiles/any", json={"delivery": delivery})
    assert answer.status_code == 422
    (problem,) = answer.json()["problems"]
    assert problem["field"].endswith(field)
    assert remedy in problem["detail"]
