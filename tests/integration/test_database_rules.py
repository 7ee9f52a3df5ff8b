"""Rules that only hold if the database holds them: leases, the outbox, telemetry once. On SQLite and PostgreSQL."""

from __future__ import annotations

import datetime as dt
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from sqlalchemy import select

from agent.protocol.facts import DeviceFacts
from agent.protocol.histogram import bucket_of
from agent.protocol.messages import HostWindow, ModelWindow, Reported, TelemetryBatch
from agent.protocol.version import SPOKEN
from converters.job import JobError
from fleet_server import outbox
from fleet_server.clock import utc_now
from fleet_server.conversions import service as conversions
from fleet_server.db import Database, rows_in
from fleet_server.devices import service as devices
from fleet_server.devices.schemas import ProfileCreate
from fleet_server.models import (
    ConversionJob,
    Model,
    TelemetryRollup,
    TelemetrySeries,
    TelemetrySpool,
    Variant,
    Version,
)
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.rollouts.engine import RolloutEngine
from fleet_server.settings import Settings
from fleet_server.telemetry import service as telemetry
from fleet_server.telemetry.repository import SeriesKey
from tests.reporting import record_report

SPEC = ProfileCreate(name="p", runtime="onnx")


def queue_jobs(database: Database, count: int) -> None:
    with database.write() as session:
        profile = devices.create_profile(session, DEFAULT_FLEET, SPEC, actor="test")
        model = Model(fleet_id=DEFAULT_FLEET, name="m")
        session.add(model)
        session.flush()
        for number in range(count):
            version = Version(
                fleet_id=DEFAULT_FLEET, model_id=model.id, name=str(number), inputs=[], outputs=[], labels=[], gate={},
                inspection={},
            )  # fmt: skip
            session.add(version)
            session.flush()
            variant = Variant(
                fleet_id=DEFAULT_FLEET, version_id=version.id, profile_id=profile.id, candidates=[], state="queued",
                profile_spec=profile.spec,
            )  # fmt: skip
            session.add(variant)
            session.flush()
            session.add(ConversionJob(fleet_id=DEFAULT_FLEET, variant_id=variant.id))


def claim(database: Database, owner: str, now: dt.datetime | None = None) -> conversions.ClaimedJob | None:
    with database.write() as session:
        return conversions.claim(session, owner, now or utc_now())


def test_no_job_is_run_by_two(database: Database) -> None:
    queue_jobs(database, 24)

    def work(owner: str) -> list[str]:
        taken = []
        while (claimed := claim(database, owner)) is not None:
            taken.append(claimed.job_id)
        return taken

    with ThreadPoolExecutor(4) as pool:
        taken = [job for jobs in pool.map(work, ["a", "b", "c", "d"]) for job in jobs]
    assert len(taken) == 24
    assert len(set(taken)) == 24


@pytest.mark.parametrize("round_", range(5))
def test_the_same_work_is_done_once_at_a_time(database: Database, round_: int) -> None:
    queue_jobs(database, 8)
    with database.write() as session:
        for number, job in enumerate(session.query(ConversionJob).order_by(ConversionJob.id)):
            job.work = "ab" * 32 if number % 4 else None
    with ThreadPoolExecutor(8) as pool:
        claimed = [one for one in pool.map(lambda name: claim(database, name), "abcdefgh") if one is not None]
    with database.read() as session:
        works = [session.get_one(ConversionJob, one.job_id).work for one in claimed]
    assert works.count("ab" * 32) <= 1
    now = utc_now()
    while (one := claim(database, "late", now)) is not None:
        claimed.append(one)
    with database.read() as session:
        works = [session.get_one(ConversionJob, one.job_id).work for one in claimed]
    assert (works.count("ab" * 32), works.count(None)) == (1, 2)
    done = next(one for one, work in zip(claimed, works, strict=True) if work)
    with database.write() as session:
        conversions.fail(session, done, JobError("x", "x"), now)
    second = claim(database, "next", now)
    assert second is not None
    later = now + dt.timedelta(seconds=conversions.LEASE_S + 1)
    third = claim(database, "after its death", later)
    assert third is not None, "a work whose runner died is free"


def test_a_lost_job_is_taken_over_and_its_first_runner_has_no_more_say(database: Database) -> None:
    queue_jobs(database, 1)
    start = utc_now()
    first = claim(database, "a", start)
    assert first is not None
    assert claim(database, "b", start) is None
    second = claim(database, "b", start + dt.timedelta(seconds=conversions.LEASE_S + 1))
    assert second is not None
    assert second.job_id == first.job_id
    with database.write() as session:
        assert not conversions.heartbeat(session, first, utc_now(), 0.5, "late")
        conversions.fail(session, first, JobError("late", "late"), utc_now())
        assert conversions.heartbeat(session, second, utc_now(), 0.5, "on")
        assert session.get_one(Variant, first.variant_id).state == "building"


def test_a_job_that_kills_its_runners_is_given_up_with_a_reason(database: Database) -> None:
    queue_jobs(database, 1)
    now = utc_now()
    for attempt in range(conversions.ATTEMPTS):
        claimed = claim(database, f"runner {attempt}", now)
        assert claimed is not None
        now += dt.timedelta(seconds=conversions.LEASE_S + 1)
    assert claim(database, "the next", now) is None
    with database.read() as session:
        variant = session.query(Variant).one()
        assert variant.state == "failed"
        assert variant.failure is not None
        assert variant.failure["code"] == "gave_up"
    assert claim(database, "and another", now) is None


def test_the_outbox_keeps_order_and_only_the_newest_of_a_retained_topic(database: Database) -> None:
    with database.write() as session:
        for number, (topic, retain) in enumerate([("a", True), ("b", False), ("a", True), ("b", False)]):
            payload = str(number).encode()
            outbox.enqueue(session, fleet_id=DEFAULT_FLEET, topic=topic, payload=payload, retain=retain)
            session.flush()
    with database.write() as session:
        waiting = outbox.pending(session, limit=10)
        assert [message.payload for message in waiting] == [b"1", b"2", b"3"]
        outbox.acknowledge(session, [waiting[0].id])
        assert [message.payload for message in outbox.pending(session, limit=10)] == [b"2", b"3"]


def test_a_change_that_is_rolled_back_sends_nothing(database: Database) -> None:
    def fail_after_enqueueing() -> None:
        with database.write() as session:
            outbox.enqueue(session, fleet_id=DEFAULT_FLEET, topic="a", payload=b"x", retain=False)
            session.flush()
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail_after_enqueueing()
    with database.read() as session:
        assert outbox.pending(session, limit=10) == []


def register(database: Database, device_id: str) -> None:
    facts = DeviceFacts(
        agent_version="1",
        os="",
        kernel="",
        arch="x86_64",
        cpu_model="",
        cpu_cores=1,
        cpu_features=(),
        memory_mb=1024,
        disk_free_mb=1024,
    )
    reported = Reported(
        protocol=SPOKEN, boot_id="b", sequence=1, revision=0, facts=facts, deployments=(), serving=(), sent_at=0.0
    )
    with database.write() as session:
        record_report(session, device_id, reported, utc_now())


def test_telemetry_that_comes_twice_counts_once(database: Database) -> None:
    register(database, "dev-1")
    now = utc_now()
    latency = {bucket_of(0.004): 90, bucket_of(0.1): 10}
    window = ModelWindow("d", "m", "1", "a" * 64, "cpu", 100, 2, 0, 100, latency, ((0, 0, 40), (0, 1, 10), (1, 1, 50)))
    whole = TelemetryBatch(SPOKEN, "spool", 7, now.timestamp() - 10, now.timestamp(), (window,), HostWindow())
    for batch in (whole, whole, msgspec.structs.replace(whole, sequence=8)):
        with database.write() as session:
            assert telemetry.store_batch(session, "dev-1", batch, now)
    with database.write() as session:
        assert not telemetry.store_batch(session, "nobody", whole, now)
    with database.read() as session:
        (found,) = telemetry.summarize(session, DEFAULT_FLEET)
    assert (found.requests, found.errors, found.labelled) == (200, 4, 200)
    assert found.accuracy == 0.9
    assert found.latency_p50_ms is not None
    assert found.latency_p95_ms is not None
    assert 3.5 < found.latency_p50_ms < 4.6
    assert 85 < found.latency_p95_ms < 115
    assert found.macro_recall == 0.9


def test_one_engine_holds_the_lease_until_it_stops(database: Database) -> None:
    one, other = RolloutEngine(database, Settings()), RolloutEngine(database, Settings())
    assert one._lease.hold()
    assert not other._lease.hold()
    assert one._lease.hold()
    one.stop()
    assert other._lease.hold()


def test_rows_of_many_columns_are_found_in_an_index(database: Database) -> None:
    """For tuples alone SQLite reads the whole table: a million windows for each batch of telemetry."""
    if not database.is_sqlite:
        return
    spool, period = TelemetrySpool, TelemetryRollup
    conditions = (
        rows_in((spool.device_id, spool.spool_id), [("a", "b"), ("c", "d")]),
        rows_in((period.series_id, period.step_s, period.period_at), [(1, 3600, utc_now()), (2, 3600, utc_now())]),
        rows_in([getattr(TelemetrySeries, name) for name in SeriesKey._fields], [SeriesKey(*"abcdef")]),
    )
    for condition, table in zip(conditions, (spool, period, TelemetrySeries), strict=True):
        query = select(table).where(condition)
        text = query.compile(database.engine, compile_kwargs={"render_postcompile": True})
        with database.read() as session:
            explain = session.connection().exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", (1,) * len(text.params))
            plan = [row[3] for row in explain]
        assert plan[0].startswith(f"SEARCH {table.__tablename__} USING"), plan
