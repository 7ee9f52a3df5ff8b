"""Rollouts that judge: rules over telemetry, order, rates, caps, retries, holds, late devices and dry runs."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from sqlalchemy import update

from agent.protocol.histogram import bucket_of
from agent.protocol.lifecycle import Phase
from agent.protocol.messages import HostWindow, ModelWindow, TelemetryBatch
from agent.protocol.version import SPOKEN
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.devices import service as devices
from fleet_server.devices.schemas import DeviceUpdate
from fleet_server.errors import ConflictError
from fleet_server.models import Deployment, Device, ModelWindowRow, Rollout
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.rollouts import comparing, evidence, explaining, previewing, service
from fleet_server.rollouts.engine import advance
from fleet_server.rollouts.schemas import PinRequest, RolloutCreate, RolloutExplanation, RolloutPreview
from fleet_server.telemetry import service as telemetry
from tests.databases import short_on_sqlite
from tests.integration.test_rollout_rules import HALVES, SETTINGS, World

ALL = {"stages": [{"percent": 100, "soak_s": 3600}]}
SLOWER = {"metric": "latency_p95_ratio", "above": 1.3, "min_samples": 50}


COUNTS = ("errors", "confusion", "compared", "disagreed")


class JudgedWorld(World):
    """Devices that also send telemetry."""

    _window = 0

    def measured(self, device: str, version: str, ms: float = 10.0, **fields: Any) -> None:
        """One window of what the device was sent last, of fifty requests."""
        (deployment,) = self.desired(device)
        JudgedWorld._window += 1
        counts = {"requests": 50, **{key: fields.pop(key) for key in COUNTS if key in fields}}
        window = ModelWindow(
            "m", version, version * 64, deployment, "cpu", latency={bucket_of(ms / 1000): 50}, **counts
        )  # fmt: skip
        now = utc_now()
        batch = TelemetryBatch(
            SPOKEN, "s", JudgedWorld._window, now.timestamp() - 30, now.timestamp(), (window,), HostWindow(**fields)
        )
        with self.database.write() as session:
            telemetry.store_batch(session, device, batch, now)

    def explain(self, rollout: str) -> RolloutExplanation:
        with self.database.read() as session:
            return explaining.explain(session, SETTINGS, session.get_one(Rollout, rollout))

    def preview(self, **fields: Any) -> RolloutPreview:
        wanted = {"version": "m@2", "target": {"all": True}, **fields}
        with self.database.read() as session:
            return previewing.preview(session, DEFAULT_FLEET, RolloutCreate.model_validate(wanted))

    def tag(self, device: str, **tags: str) -> None:
        with self.database.write() as session:
            devices.update_device(session, DEFAULT_FLEET, device, DeviceUpdate(tags=tags), actor="test")

    def sent(self, version: str) -> set[str]:
        return {device for device in "abcdefgh" if version in self.desired(device).values()}

    def run_on(self, version: str, takers: str) -> None:
        """A rollout to all that only some take."""
        rollout = self.create(version, strategy={"stages": [{"percent": 100}]})
        for device in takers:
            self.goes(device, Phase.ACTIVE, version)
        assert self.tick(rollout).state == "succeeded"

    def later(self, rollout: str, seconds: float) -> None:
        """Let everything of a rollout have happened so long ago."""
        ago = dt.timedelta(seconds=seconds)
        with self.database.write() as session:
            row = session.get_one(Rollout, rollout)
            row.began_at, row.joined_at = row.began_at and row.began_at - ago, None
            if row.pacing:
                row.pacing = {**row.pacing, "at": row.pacing["at"] - seconds}
            session.execute(
                update(Deployment)
                .where(Deployment.rollout_id == rollout, Deployment.settled_at.is_not(None))
                .values(settled_at=utc_now() - ago)
            )


@pytest.fixture
def world(database: Database) -> JudgedWorld:
    return JudgedWorld(database)


def test_a_slower_version_is_taken_back_by_what_each_device_had_before(world: JudgedWorld) -> None:
    world.run("1")
    for device in "abcd":
        world.measured(device, "1", 10.0 if device < "c" else 40.0)
    rollout = world.create("2", strategy={**ALL, "stop_when": [SLOWER]})
    for device in "abcd":
        world.goes(device, Phase.ACTIVE, "2")
    windows = 0
    while world.tick(rollout).state == "running":
        for device in "abcd":
            world.measured(device, "2", 16.0 if device < "c" else 64.0)
        windows += 1
        assert windows < 10
    explained = world.explain(rollout)
    (rule,) = explained.rules
    assert (rule.stops, rule.devices, rule.samples) == (True, 4, 4 * windows)
    assert rule.value == pytest.approx(1.6, rel=0.05)
    assert "latency_p95_ratio above 1.3" in world.view(rollout).verdicts[-1].reason
    assert world.sent("1") == set("abcd"), "all of them go back"


@short_on_sqlite("database")
def test_an_equal_version_goes_through_however_often_it_is_looked_at(world: JudgedWorld) -> None:
    world.run("1")
    for device in "abcd":
        world.measured(device, "1")
    rollout = world.create("2", strategy={**ALL, "stop_when": [SLOWER]})
    for device in "abcd":
        world.goes(device, Phase.ACTIVE, "2")
    for _ in range(10):
        for device in "abcd":
            world.measured(device, "2", 11.0)
        assert world.tick(rollout).state == "running"
    world.later(rollout, 3601)
    assert world.tick(rollout).state == "succeeded"


def test_a_window_counts_once_whoever_looks(world: JudgedWorld) -> None:
    world.run("1")
    for device in "abcd":
        world.measured(device, "1")
    rollout = world.create("2", strategy={**ALL, "stop_when": [SLOWER]})
    for device in "abcd":
        world.goes(device, Phase.ACTIVE, "2")
        world.measured(device, "2")
    for _ in range(3):
        world.tick(rollout)
    with world.database.write() as session:
        assert not evidence.gather(session, session.get_one(Rollout, rollout)), "there is nothing new"
        judged = session.query(ModelWindowRow).filter_by(judged=True).count()
    assert judged == 4
    assert world.explain(rollout).rules[0].samples == 4


def test_a_server_that_dies_in_a_tick_has_done_nothing(world: JudgedWorld) -> None:
    world.run("1")
    rollout = world.create("2", strategy={**HALVES, "stop_when": [SLOWER]})
    first = world.sent("2")
    for device in first:
        world.goes(device, Phase.ACTIVE, "2")
        world.measured(device, "2")

    class KilledError(Exception):
        pass

    def die() -> None:
        with world.database.write() as session:
            advance(session, SETTINGS, session.get_one(Rollout, rollout))
            assert session.get_one(Rollout, rollout).stage == 1
            raise KilledError

    with pytest.raises(KilledError):
        die()
    assert (world.view(rollout).stage, world.sent("2")) == (0, first)
    with world.database.read() as session:
        assert session.query(ModelWindowRow).filter_by(judged=True).count() == 0
    assert world.tick(rollout).stage == 1
    assert world.sent("2") == set("abcd")


@short_on_sqlite("database")
def test_what_changes_for_all_devices_is_no_reason(world: JudgedWorld) -> None:
    world.run("1")
    for device in "abcd":
        world.measured(device, "1")
    strategy = {"stages": [{"percent": 50, "soak_s": 3600}, {"percent": 100}]}
    rollout = world.create("2", strategy={**strategy, "stop_when": [{**SLOWER, "against": "control"}]})
    first = world.sent("2")
    for device in first:
        world.goes(device, Phase.ACTIVE, "2")
    for _ in range(12):
        for device in "abcd":
            world.measured(device, "2" if device in first else "1", 20.0)
        assert world.tick(rollout).state == "running"
    assert world.explain(rollout).rules[0].value == pytest.approx(1.0, rel=0.1)


def test_accuracy_temperature_and_memory_come_from_windows(world: JudgedWorld) -> None:
    world.run("1")
    for device in "abcd":
        world.measured(device, "1", agent_rss_mb=100.0, temperature_c=50.0)
    rules = [
        {"metric": "accuracy_drop_points", "above": 2, "min_samples": 10, "confidence": 0.99},
        {"metric": "memory_rise_mb", "above": 500, "min_samples": 50},
        {"metric": "temperature_rise_c", "above": 30, "min_samples": 50},
    ]
    rollout = world.create("2", strategy={**ALL, "stop_when": rules, "on_stop": "pause"})
    for device in "abcd":
        world.goes(device, Phase.ACTIVE, "2")
        world.measured(device, "2", agent_rss_mb=180.0, temperature_c=61.0, confusion=((1, 1, 30), (1, 2, 20)))
    paused = world.tick(rollout)
    assert paused.state == "paused"
    accuracy, memory, temperature = world.explain(rollout).rules
    assert (accuracy.stops, accuracy.value) == (True, pytest.approx(30))
    assert (memory.value, temperature.value) == (pytest.approx(80), pytest.approx(11))
    assert (memory.stops, temperature.stops) == (False, False)


def test_stages_by_count_in_the_order_of_a_tag(world: JudgedWorld) -> None:
    world.tag("c", ring="canary")
    strategy = {
        "stages": [{"count": 1}, {"percent": 100, "approval": True}],
        "order": {"tag": "ring", "first": ["canary"]},
    }
    rollout = world.create("1", strategy=strategy)
    assert world.sent("1") == {"c"}
    world.goes("c", Phase.ACTIVE)
    assert world.tick(rollout).stage == 0
    assert "stage 2 begins when somebody lets it" in world.explain(rollout).now
    world.act(rollout, lambda session, row: service.promote(session, SETTINGS, row, full=False, actor="ada"))
    assert world.tick(rollout).stage == 1
    assert world.sent("1") == set("abcd")
    with pytest.raises(ConflictError, match="in stage 2 of 2"):
        world.act(rollout, lambda session, row: service.promote(session, SETTINGS, row, full=True, actor="ada"))


def test_a_rate_and_caps_hold_devices_back_until_there_is_room(world: JudgedWorld) -> None:
    for device in "abc":
        world.tag(device, site="one")
    strategy = {**ALL, "rate": {"per_minute": 2}, "caps": {"tag": "site", "per_value": 1}}
    rollout = world.create("1", strategy=strategy)
    assert len(world.sent("1")) == 1
    world.tick(rollout)
    assert len(world.sent("1")) == 1, "half a minute is not over"
    world.later(rollout, 31)
    world.tick(rollout)
    sent = world.sent("1")
    assert len(sent) == 2
    assert "d" in sent, "of the site one is under way"
    world.later(rollout, 31)
    world.tick(rollout)
    assert world.sent("1") == sent
    assert "for its rate or a cap" in world.explain(rollout).now
    for device in sent:
        world.goes(device, Phase.ACTIVE)
    world.tick(rollout)
    assert len(world.sent("1")) == 3


@short_on_sqlite("database")
def test_what_failed_is_tried_again_as_often_as_the_strategy_says(world: JudgedWorld) -> None:
    strategy = {**ALL, "stop_when": [], "retry": {"attempts": 1, "wait_s": 60}}
    rollout = world.create("1", strategy=strategy)
    for device in "bcd":
        world.goes(device, Phase.ACTIVE)
    (first,) = world.desired("a")
    world.goes("a", Phase.FAILED)
    waiting = world.tick(rollout)
    assert "1 devices that failed will be tried again" in world.explain(rollout).now
    world.later(rollout, 61)
    assert world.tick(rollout).counts.total == waiting.counts.total == 4
    (second,) = world.desired("a")
    assert second != first
    world.goes("a", Phase.FAILED)
    world.later(rollout, 4000)
    done = world.tick(rollout)
    assert (done.state, done.counts.failed, done.counts.active) == ("succeeded", 1, 3)
    world.act(rollout, lambda session, row: service.retry(session, SETTINGS, row, actor="ada"))
    world.goes("a", Phase.ACTIVE)
    world.later(rollout, 4000)
    done = world.tick(rollout)
    assert (done.state, done.counts.failed, done.counts.active) == ("succeeded", 0, 4)
    with pytest.raises(ConflictError, match="no deployment of it has failed"):
        world.act(rollout, lambda session, row: service.retry(session, SETTINGS, row, actor="ada"))


@short_on_sqlite("database")
def test_a_held_device_is_sent_nothing_until_it_is_released(world: JudgedWorld) -> None:
    with world.database.write() as session:
        devices.hold_device(session, DEFAULT_FLEET, "a", "under repair", actor="ada")
    rollout = world.create("1", strategy={"stages": [{"percent": 50}, {"percent": 100}]})
    for device in "bcd":
        if device in world.sent("1"):
            world.goes(device, Phase.ACTIVE)
    world.tick(rollout)
    for device in "bcd":
        if device in world.sent("1"):
            world.goes(device, Phase.ACTIVE)
    assert world.sent("1") == set("bcd")
    assert [(one.device_id, one.reason) for one in world.explain(rollout).held] == [("a", "under repair")]
    done = world.tick(rollout)
    assert (done.state, done.counts.active) == ("succeeded", 3)
    assert "1 are held" in done.verdicts[-1].reason
    with world.database.write() as session:
        devices.release_device(session, DEFAULT_FLEET, "a", actor="ada")
        assert session.query(Device).filter(Device.hold.is_(None)).count() == 4


@short_on_sqlite("database")
def test_a_pinned_device_is_moved_by_no_other_rollout(world: JudgedWorld) -> None:
    world.run("1")
    wanted = PinRequest(version="m@2", reason="compared", allow_unproven=True)
    with world.database.write() as session:
        pinned = service.pin(session, SETTINGS, DEFAULT_FLEET, "a", wanted, actor="ada").id
    assert world.sent("2") == {"a"}
    world.goes("a", Phase.ACTIVE, "2")
    assert world.tick(pinned).state == "succeeded"
    world.run_on("1", "bcd")
    assert world.sent("2") == {"a"}
    with world.database.write() as session:
        service.pin(session, SETTINGS, DEFAULT_FLEET, "a", wanted, actor="ada")
        assert session.get_one(Device, "a").hold["reason"] == "compared"


@short_on_sqlite("database")
def test_a_shadow_is_judged_by_its_answers_before_it_serves(world: JudgedWorld) -> None:
    world.run("1")
    with world.database.write() as session:
        for device in session.query(Device).filter(Device.id != "d"):
            device.facts = {**device.facts, "features": ["exposure"]}
    rule = {"metric": "disagreement_percent", "above": 5, "min_samples": 20}
    exposure = {"mode": "shadow", "share": 0.5, "for_s": 60}
    rollout = world.create("2", strategy={"stages": [{"percent": 100}], "stop_when": [rule], "exposure": exposure})

    def exposures() -> dict[str, str]:
        found = {device: world.messages(device)[0].deployments[0].exposure for device in "abcd"}
        return {device: one.mode.value for device, one in found.items() if one is not None}

    assert exposures() == dict.fromkeys("abc", "shadow"), "d does not know how"
    for device in "abc":
        world.goes(device, Phase.EXPOSED, "2")
    world.goes("d", Phase.ACTIVE, "2")
    for device in "abc":
        world.measured(device, "2", compared=40, disagreed=1)
    waiting = world.tick(rollout)
    assert waiting.state == "running"
    assert "3 of them run it beside the version before" in world.explain(rollout).now
    with world.database.write() as session:
        session.execute(update(Deployment).values(exposed_at=utc_now() - dt.timedelta(seconds=61)))
    world.tick(rollout)
    assert exposures() == {}, "its time is over"
    with world.database.read() as session:
        found = comparing.compare(session, session.get_one(Rollout, rollout))
    (cohort,) = found.cohorts
    assert (cohort.profile, cohort.devices) == ("p", 4)
    disagreement = next(one for one in cohort.figures if one.name == "disagreement_percent")
    assert disagreement.now is not None
    assert disagreement.now.value == pytest.approx(2.5)
    for device in "abc":
        world.measured(device, "2", compared=40, disagreed=30)
    stopped = world.tick(rollout)
    assert stopped.state == "reverting"
    assert "disagreement_percent above 5" in stopped.verdicts[-1].reason
    assert world.sent("1") == set("abcd")


def test_late_devices_join_the_stage_that_is_open(world: JudgedWorld) -> None:
    rollout = world.create("1", strategy={"stages": [{"percent": 50}, {"percent": 100}], "stop_when": []})
    first = world.sent("1")
    world.report("e")
    world.later(rollout, 60)
    world.tick(rollout)
    with world.database.read() as session:
        stages = {row.device_id: row.stage for row in session.query(Deployment).filter_by(rollout_id=rollout)}
    assert set(stages) == set("abcde")
    if stages["e"] == 0:
        assert "e" in world.sent("1")
        first |= {"e"}
    for device in first:
        world.goes(device, Phase.ACTIVE)
    world.tick(rollout)
    for device in set("abcde") - first:
        world.goes(device, Phase.ACTIVE)
    world.report("f")
    world.later(rollout, 60)
    joined = world.tick(rollout)
    assert (joined.state, joined.counts.total) == ("running", 6)
    assert "f" in world.sent("1")
    world.goes("f", Phase.ACTIVE)
    assert world.tick(rollout).state == "succeeded"
    world.report("g")
    world.later(rollout, 60)
    assert world.tick(rollout).counts.total == 6, "an ended rollout takes nobody in"
    other = world.create("2", target={"all": True, "late": False}, strategy=ALL)
    world.report("h")
    world.later(other, 60)
    assert "h" not in {*world.phases(other)} | world.sent("2")
    assert world.tick(other).counts.total == 7


@short_on_sqlite("database")
def test_a_target_that_can_not_be_asked_any_more_takes_nobody_in_and_stops_nothing(world: JudgedWorld) -> None:
    world.tag("a", site="one")
    rollout = world.create("1", target={"query": "site==one"}, strategy={"stages": [{"percent": 100}]})
    world.tag("a", other="two")
    world.report("e")
    world.later(rollout, 60)
    assert world.tick(rollout).counts.total == 1, "no device has such a tag: the query is refused"
    world.goes("a", Phase.ACTIVE, "1")
    assert world.tick(rollout).state == "succeeded"


@short_on_sqlite("database")
def test_taking_back_keeps_to_its_rate_and_says_who_did_not_take_it(world: JudgedWorld) -> None:
    world.run("1")
    strategy = {"stages": [{"percent": 100, "soak_s": 3600}], "revert_per_minute": 2}
    rollout = world.create("2", strategy=strategy)
    for device in "abcd":
        world.goes(device, Phase.ACTIVE, "2")
    world.act(rollout, lambda session, row: service.abort(session, SETTINGS, row, revert=True, actor="ada"))
    for already in range(1, 5):
        assert len(world.sent("1")) == already
        assert world.tick(rollout).state == "reverting"
        assert len(world.sent("1")) == already, "half a minute is not over"
        world.later(rollout, 31)
        world.tick(rollout)
    for device in "abc":
        world.goes(device, Phase.ACTIVE, "1")
    world.goes("d", Phase.FAILED, "1")
    done = world.tick(rollout)
    assert done.state == "stopped"
    assert "3 of 4 devices run again what they ran before; d did not take it" in done.verdicts[-1].reason


@short_on_sqlite("database")
def test_past_its_deadline_a_rollout_pauses_and_says_what_it_waits_for(world: JudgedWorld) -> None:
    rollout = world.create("1", strategy={"stages": [{"percent": 100}], "deadline_s": 60})
    assert world.tick(rollout).state == "running"
    world.later(rollout, 61)
    paused = world.tick(rollout)
    assert paused.state == "paused"
    assert "past its deadline of 60 s: 4 of 4 devices have not settled" in paused.verdicts[-1].reason
    world.act(rollout, lambda session, row: service.resume(session, SETTINGS, row, actor="ada"))
    assert world.tick(rollout).state == "running", "it has as long again"


@short_on_sqlite("database")
def test_a_dry_run_says_what_would_happen_and_changes_nothing(world: JudgedWorld) -> None:
    with world.database.write() as session:
        session.add(Device(id="stranger", fleet_id=DEFAULT_FLEET))
        devices.hold_device(session, DEFAULT_FLEET, "b", "under repair", actor="ada")
        session.get_one(Device, "d").online = False
    busy = world.create("1", target={"devices": ["a"]})
    strategy = {"stages": [{"percent": 50, "soak_s": 60}, {"percent": 100}], "rate": {"per_minute": 1}}
    found = world.preview(strategy=strategy)
    assert (found.devices, found.starts, found.broadcast_bytes) == (4, False, 2)
    assert [(stage.devices, stage.at_least_s) for stage in found.stages] == [(2, 120), (2, 60)]
    problems = {one.code: one for one in found.problems}
    assert {code: one.blocks for code, one in problems.items()} == {
        "device_without_profile": True,
        "variant_unproven": True,
        "device_busy": True,
        "device_held": False,
        "device_offline": False,
    }
    assert problems["device_busy"].devices == ["a"]
    assert problems["device_without_profile"].devices == ["stranger"]
    assert [(link.link, link.devices, link.bytes) for link in found.links] == [("unknown", 4, 4)]
    with world.database.read() as session:
        assert [row.id for row in session.query(Rollout)] == [busy]
    fine = world.preview(target={"devices": ["c", "d"]}, allow_unproven=True, strategy=strategy)
    assert fine.starts
    planned = [device for stage in fine.stages for device in stage.first]
    created = world.create("2", target={"devices": ["c", "d"]}, strategy=strategy)
    assert world.sent("2") == {planned[0]}, "it is what was shown"
    assert created != busy
