"""The overview and its history, from what devices report and send. On both databases."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import msgspec
import pytest
from alembic import command

from agent.protocol.messages import Reported, ServingReport
from agent.protocol.version import SPOKEN
from fleet_server import migrations
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.devices import service as devices
from fleet_server.devices.schemas import ProfileCreate
from fleet_server.errors import InvalidError
from fleet_server.models import (
    Deployment,
    Device,
    Enrolment,
    Fleet,
    FleetSnapshot,
    Model,
    Profile,
    Rollout,
    TelemetryFleetTotal,
    Variant,
    Version,
)
from fleet_server.overview import repository, service
from fleet_server.overview.keeper import OverviewKeeper
from fleet_server.overview.schemas import History, Overview, StepCode, VersionCount
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.settings import Settings
from fleet_server.telemetry.keeper import TelemetryKeeper
from fleet_server.telemetry.totals import FLEET_S, HOUR_S, period_of
from tests import rest
from tests.integration.test_api import facts
from tests.integration.test_telemetry import HOUR, NOW, roll_up, sent, store
from tests.reporting import record_report

DAY = dt.timedelta(days=1)


def serving(version: str, provider: str = "cpu", fell_back: str = "") -> ServingReport:
    return ServingReport("m", version, "a" * 64, "d", "onnx", provider, 0.1, fell_back=fell_back)


def report(database: Database, device: str, *served: ServingReport, sequence: int = 1, agent: str = "1") -> None:
    with database.write() as session:
        measured = msgspec.structs.replace(facts(), agent_version=agent)
        said = Reported(SPOKEN, "b", sequence, 0, measured, serving=served)
        record_report(session, device, said, utc_now())


def overview(database: Database, fleet_id: str = DEFAULT_FLEET, now: dt.datetime = NOW) -> Overview:
    with database.read() as session:
        return service.overview(session, fleet_id, now)


def history(database: Database, now: dt.datetime = NOW, **wanted: Any) -> History:
    wanted = {"since": None, "until": None, "step_s": HOUR_S, **wanted}
    with database.read() as session:
        return service.history(session, DEFAULT_FLEET, **wanted, now=now)


def change(database: Database, device: str, **values: Any) -> None:
    with database.write() as session:
        for name, value in values.items():
            setattr(session.get_one(Device, device), name, value)


def test_an_empty_fleet_is_told_how_to_begin(database: Database) -> None:
    found = overview(database)
    assert (found.devices.total, found.versions, found.deployments, found.rollouts) == (0, [], {}, {})
    assert (found.telemetry.requests, found.telemetry.latency_p95_ms) == (0, None)
    assert [one.code for one in found.next_steps] == [StepCode.NO_DEVICE, StepCode.NO_MODEL]


def test_devices_count_by_profile_by_what_really_runs_and_by_version(database: Database) -> None:
    report(database, "a", serving("1", "cuda"))
    report(database, "b", serving("1", "cpu", "CUDA failed"))
    report(database, "c", serving("2", "cpu"))
    report(database, "d")
    report(database, "e", serving("1"))
    with database.write() as session:
        wanted = ProfileCreate(name="all", runtime="onnx", match={})
        devices.create_profile(session, DEFAULT_FLEET, wanted, actor="test")
        session.get_one(Device, "d").profile_id = None
        session.get_one(Device, "c").online = False
        session.get_one(Device, "e").online = False
    with database.write() as session:
        devices.forget_device(session, DEFAULT_FLEET, "e", actor="test")
    found = overview(database)
    counts = found.devices
    assert (counts.total, counts.online, counts.offline, counts.fell_back) == (4, 3, 1, 1)
    assert [(one.profile, one.online, one.offline) for one in counts.by_profile] == [("all", 2, 1), (None, 1, 0)]
    assert [(one.provider, one.devices, one.fell_back) for one in counts.by_provider] == [("cpu", 2, 1), ("cuda", 1, 0)]
    assert [(one.model, one.version, one.devices) for one in found.versions] == [("m", "1", 2), ("m", "2", 1)]
    assert "1 device matches no profile" in found.next_steps[0].text

    report(database, "b", serving("2", "cuda"), sequence=2)
    found = overview(database)
    assert (found.devices.fell_back, [one.devices for one in found.versions]) == (0, [1, 2])


def test_devices_count_by_the_version_of_their_agent_the_newest_first(database: Database) -> None:
    for device, version in (("a", "9.1.0"), ("b", "10.0.0"), ("c", "9.1.0"), ("d", "of somebody")):
        report(database, device, agent=version)
    counts = [(one.version, one.devices) for one in overview(database).agent_versions]
    assert counts == [("10.0.0", 1), ("9.1.0", 2), ("of somebody", 1)]
    report(database, "a", sequence=2, agent="10.0.0")
    assert [one.devices for one in overview(database).agent_versions] == [2, 1, 1]


def test_a_device_that_fell_back_twice_counts_once(database: Database) -> None:
    other = msgspec.structs.replace(serving("1", "cuda", "no TensorRT"), model="n")
    report(database, "a", serving("1", "cpu", "CUDA failed"), other)
    report(database, "b", serving("1", "cpu", "CUDA failed"))
    assert overview(database).devices.fell_back == 2
    with database.read() as session:
        condition = devices.query_condition(session, DEFAULT_FLEET, "fell_back==cuda", field="query")
        assert [one.id for one in devices.repository.devices_where(session, DEFAULT_FLEET, condition)] == ["a"]


def test_what_is_under_way_counts_and_what_lacks_is_named(database: Database) -> None:
    report(database, "a")
    report(database, "b")
    with database.write() as session:
        fleet = {"fleet_id": DEFAULT_FLEET}
        session.add(profile := Profile(**fleet, name="p", spec={"match": {}, "runtime": "onnx"}))
        session.add(model := Model(**fleet, name="m"))
        session.flush()
        versions = [Version(**fleet, model_id=model.id, name=str(one), inputs=[], outputs=[]) for one in (1, 2)]
        for one in versions:
            session.add(one)
            session.flush()
        kept = {"profile_id": profile.id, "profile_spec": {}}
        session.add(variant := Variant(**fleet, version_id=versions[0].id, state="ready", **kept))
        session.flush()
    ready = overview(database)
    assert [one.code for one in ready.next_steps] == [
        StepCode.UNMATCHED_DEVICES, StepCode.NO_VARIANT, StepCode.READY_WITHOUT_ROLLOUT,
    ]  # fmt: skip
    assert ready.next_steps[1].command.startswith("shoal variant build m@2 ")
    with database.write() as session:
        session.add(Variant(**fleet, version_id=versions[1].id, state="building", **kept))
        of_rollout = {"name": "r", "version_id": versions[0].id, "target": {"all": True}, "strategy": {}}
        rollouts = [Rollout(**fleet, state=state, **of_rollout) for state in ("running", "running", "succeeded")]
        session.add_all(rollouts)
        session.flush()
        for rollout, phases in zip(
            rollouts, (("scheduled", "downloading"), ("downloading",), ("active",)), strict=True
        ):
            for device, phase in zip("ab", phases, strict=False):
                session.add(Deployment(
                    **fleet, rollout_id=rollout.id, device_id=device, model_id=model.id, version_id=versions[0].id,
                    variant_id=variant.id, stage=0, phase=phase,
                ))  # fmt: skip
        for number, state in enumerate(("pending", "pending", "rejected")):
            session.add(Enrolment(
                **fleet, device_id=f"n-{number}", key_sha256=str(number), csr="", reason="", address="", state=state
            ))  # fmt: skip
    found = overview(database)
    assert found.deployments == {"scheduled": 1, "downloading": 2}
    assert found.rollouts == {"running": 2, "succeeded": 1}
    assert (found.variants_building, found.enrolments_waiting) == (1, 2)
    assert [one.code for one in found.next_steps] == [StepCode.ENROLMENTS_WAIT, StepCode.UNMATCHED_DEVICES]


def test_another_fleet_counts_for_itself(database: Database) -> None:
    with database.write() as session:
        session.add(Fleet(id="other"))
    report(database, "a", serving("1"))
    store(database, sent("a", 1))
    roll_up(database)
    found = overview(database, "other")
    assert (found.devices.total, found.versions, found.telemetry.requests) == (0, [], 0)
    assert overview(database).telemetry.requests == 1


def test_the_last_hour_is_the_sum_of_its_windows_each_once(database: Database) -> None:
    report(database, "a")
    report(database, "b")
    batches = [sent(device, number, requests=number) for device in "ab" for number in (1, 2, 3)]
    old = [sent("a", 9, NOW - 2 * HOUR, requests=100)]
    store(database, *batches[:4], *old)
    assert overview(database).telemetry.requests == 0
    roll_up(database)
    assert overview(database).telemetry.requests == 7
    store(database, *batches)  # some come again
    roll_up(database)
    found = overview(database).telemetry
    assert (found.requests, found.errors) == (12, 0)
    assert (found.until - found.since, found.since <= NOW < found.until) == (HOUR, True)
    buckets = {100 + number: 2 * number for number in (1, 2, 3)}
    assert found.latency_p50_ms is not None
    assert found.latency_p99_ms is not None
    assert found.latency_p50_ms < found.latency_p99_ms
    with database.read() as session:
        rows = session.query(TelemetryFleetTotal).order_by(TelemetryFleetTotal.period_at).all()
        steps = {step: [one.requests for one in rows if one.step_s == step] for step in (FLEET_S, HOUR_S)}
        assert steps == {FLEET_S: [100, 12], HOUR_S: [100, 12]}
        newest = next(one for one in rows if one.requests == 12)
        assert msgspec.msgpack.decode(newest.latency) == buckets


def test_history_has_devices_of_the_last_hour_of_a_step_and_requests_of_all_of_it(database: Database) -> None:
    report(database, "a", serving("1"))
    keeper = OverviewKeeper(database, Settings())
    keeper.tick(NOW - HOUR)
    keeper.tick(NOW - HOUR + dt.timedelta(minutes=5))  # the hour has its snapshot
    report(database, "b", serving("2"))
    change(database, "a", online=False)
    keeper.tick(NOW)
    store(database, *(sent("a", number, NOW - number * HOUR, requests=10**number) for number in (0, 1, 2)))
    roll_up(database)
    found = history(database)
    assert found.step_s == HOUR_S
    first, second, third = found.points
    assert (first.devices, first.versions, first.requests) == (None, None, 100)
    assert (second.devices, second.online, second.requests) == (1, 1, 10)
    assert (third.devices, third.online, third.requests) == (2, 1, 1)
    assert third.versions == [VersionCount(model="m", version=one, devices=1) for one in ("1", "2")]
    whole = history(database, step_s=24 * HOUR_S, since=NOW - DAY, until=NOW + DAY)
    assert sum(one.requests for one in whole.points) == 111
    assert whole.points[-1].devices is not None
    assert history(database, until=NOW - DAY).points == []
    with pytest.raises(InvalidError, match="1000 steps"):
        history(database, since=NOW - 100 * DAY)


def test_what_is_too_old_goes(database: Database) -> None:
    settings = Settings(overview_days=2)
    keeper, telemetry = OverviewKeeper(database, settings), TelemetryKeeper(database, settings)
    report(database, "a")
    keeper.tick(NOW)
    store(database, sent("a", 1))
    telemetry.tick(NOW + HOUR)

    def kept() -> tuple[int, int]:
        with database.read() as session:
            return session.query(FleetSnapshot).count(), session.query(TelemetryFleetTotal).count()

    assert kept() == (1, 2)
    telemetry.tick(NOW + DAY + HOUR)
    assert kept() == (1, 1)  # of the sums the hour
    keeper.tick(NOW + 3 * DAY)
    telemetry.tick(NOW + 3 * DAY)
    assert kept() == (1, 0)
    with database.read() as session:
        assert session.query(FleetSnapshot).one().hour_at == period_of(NOW + 3 * DAY, HOUR_S)


def test_one_keeper_at_a_time_and_every_fleet(database: Database) -> None:
    with database.write() as session:
        session.add(Fleet(id="other"))
    one, other = OverviewKeeper(database, Settings()), OverviewKeeper(database, Settings())
    one.tick(NOW)
    other.tick(NOW + HOUR)
    with database.read() as session:
        assert [row.fleet_id for row in session.query(FleetSnapshot).order_by(FleetSnapshot.fleet_id)] == [
            DEFAULT_FLEET, "other",
        ]  # fmt: skip
    one.stop()
    other.tick(NOW + HOUR)
    with database.read() as session:
        assert session.query(FleetSnapshot).count() == 4


def test_devices_that_fell_back_before_the_upgrade_are_found(database: Database) -> None:
    report(database, "a", serving("1", "cpu", "CUDA failed"))
    report(database, "b", serving("1", "cpu"))
    for direction, revision in ((command.downgrade, "0023"), (command.upgrade, "head")):
        with database.write() as session:
            direction(migrations.configuration(session.connection()), revision)
        with database.read() as session:
            found = repository.attribute_counts(session, DEFAULT_FLEET, repository.FELL_BACK)
        assert found == ({} if revision == "0023" else {"cpu": 1})


def test_over_http(tmp_path: Path) -> None:
    with rest.serving(tmp_path, None) as application:
        report(application.state.database, "a", serving("1"))
        api = rest.caller(application)
        found = api.get("/overview")
        assert found.status_code == 200
        assert found.json()["devices"]["by_profile"] == [{"profile": None, "online": 1, "offline": 0}]
        assert api.get("/overview", headers={"If-None-Match": found.headers["etag"]}).status_code == 304
        OverviewKeeper(application.state.database, Settings()).tick(utc_now())
        told = api.get("/overview/history", params={"step": "1d", "since": (utc_now() - DAY).isoformat()}).json()
        assert [one["versions"] for one in told["points"]] == [[{"model": "m", "version": "1", "devices": 1}]]
        for wrong in ("5m", "90m", "x"):
            refused = api.get("/overview/history", params={"step": wrong})
            assert (refused.status_code, refused.json()["code"]) == (422, "bad_series")
