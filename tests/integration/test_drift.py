"""Drift to look at: how far models on devices have moved, and a version beside what it was like at first.

On both databases.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select, text

from agent.protocol.limits import LIMITS
from agent.protocol.messages import HostWindow, ModelWindow
from agent.protocol.sketch import bucket_of as number_of
from agent.protocol.sketch import confidence_bin
from fleet_server.alerts.evaluation import evaluate
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.devices import service as devices
from fleet_server.domain.alerting import Metric
from fleet_server.domain.drift import psi
from fleet_server.drift import repository, service
from fleet_server.drift.repository import OfVersion, extents_query, some_windows_query
from fleet_server.drift.schemas import DriftDistribution, DriftView, Source
from fleet_server.errors import InvalidError
from fleet_server.models import (
    Alert,
    AlertRule,
    Fleet,
    Model,
    ModelDrift,
    ModelWindowRow,
    TelemetryGroup,
    TelemetrySeries,
    Version,
)
from fleet_server.paging import PageRequest
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.telemetry.signals import pack_signals
from tests import rest
from tests.integration.test_alerts import SETTINGS, Clockwork, explained

MINUTE = dt.timedelta(minutes=1)
HOUR = dt.timedelta(hours=1)


@pytest.fixture
def works(database: Database) -> Clockwork:
    return Clockwork(database)


def said(middle: float, sure: float = 0.9, ones: int = 20, requests: int = 50) -> dict[str, Any]:
    """Fields of a window: inputs around a number, how sure the answers were, and how many of them were class 1."""
    counts = Counter(number_of(middle + step / 10) for step in range(10) for _ in range(requests // 10))
    window = ModelWindow(
        "", "m", "1", "", "cpu", requests, 0, 0, requests, {}, (), {confidence_bin(sure): requests},
        {0: requests - ones, 1: ones}, {"x:0": {"mean": dict(counts)}},
    )  # fmt: skip
    return {"requests": requests, "signals": pack_signals(window, HostWindow())}


def serve(works: Clockwork, *names: str, windows: int = 6, apart_s: float = 10, **more: Any) -> None:
    """So many windows of each device; time goes by."""
    fields = said(more.pop("middle", 1.0), **{key: more.pop(key) for key in ("sure", "ones") if key in more})
    for _ in range(windows):
        for name in names:
            works.window(name, **fields, **more)
        works.now += dt.timedelta(seconds=apart_s)


def look(works: Clockwork, device: str | None = None, query: str | None = None, **times: Any) -> DriftView:
    with works.database.read() as session:
        found = None if query is None else devices.query_condition(session, DEFAULT_FLEET, query, field="query")
        wanted = OfVersion(DEFAULT_FLEET, "m", "1", device, found)
        given = {"since": None, "until": None} | times
        return service.compare(session, wanted, ["cat", "dog"], **given, now=works.now)


def values(view: DriftView) -> dict[str, float | None]:
    return {one.metric.value: one.value for one in view.figures}


def only(view: DriftView, kind: str) -> DriftDistribution:
    (found,) = [one for one in view.distributions if one.kind == kind]
    return found


def listed(database: Database, **wanted: Any) -> list[ModelDrift]:
    with database.read() as session:
        return list(repository.drifts(session, PageRequest(50, "-worst"), DEFAULT_FLEET, **wanted).items)


def test_a_version_now_is_beside_what_was_kept_of_it(works: Clockwork) -> None:
    works.devices("a", "b")
    works.rule("inputs", metric="input_drift", threshold=0.3, window_s=120)
    works.rule("stricter", metric="input_drift", threshold=0.2, model="m", window_s=120)
    works.rule("elsewhere", metric="input_drift", threshold=0.1, model="other")
    works.rule("some", metric="input_drift", threshold=0.1, query="id==a")
    works.rule("off", metric="input_drift", threshold=0.1, enabled=False)
    serve(works, "a", "b")
    works.tick()
    taken = works.now
    works.now += 2 * HOUR
    serve(works, "a", middle=8.0, sure=0.6, ones=45)
    serve(works, "b")
    view = look(works)
    assert (view.now.requests, view.now.devices) == (600, 2)
    assert (view.now.since, view.now.until) == (works.now - HOUR, works.now)
    reference = view.reference
    assert (reference.source, reference.requests, reference.devices) == (Source.KEPT, 600, 2)
    assert (reference.since, reference.until) == (taken, taken)
    figures = {one.metric: one for one in view.figures}
    assert (figures[Metric.INPUT_DRIFT].threshold, figures[Metric.INPUT_DRIFT].rule) == (0.2, "stricter")
    assert (figures[Metric.OUTPUT_DRIFT].threshold, figures[Metric.OUTPUT_DRIFT].rule) == (None, None)
    assert [one.measure for one in view.figures] == ["psi", "psi", "ks"]

    classes = only(view, "predicted")
    assert [(one.label, one.reference, one.now) for one in classes.bins] == [
        ("cat", pytest.approx(0.6), pytest.approx(0.35)), ("dog", pytest.approx(0.4), pytest.approx(0.65)),
    ]  # fmt: skip
    expected = psi({0: 360, 1: 240}, {0: 210, 1: 390}, ordered=False)
    assert classes.distance == values(view)["output_drift"] == expected
    inputs = only(view, "input")
    assert (inputs.tensor, inputs.part, inputs.measure) == ("x:0", "mean", "psi")
    assert (inputs.reference_rows, inputs.now_rows) == (600, 600)
    assert inputs.distance == values(view)["input_drift"]
    assert sum(one.now or 0 for one in inputs.bins if one.low is not None and one.low > 5) == pytest.approx(0.5)
    assert sum(one.reference or 0 for one in inputs.bins) == pytest.approx(1)
    sure = only(view, "confidence")
    assert sure.distance == values(view)["confidence_shift"]
    assert [(one.low, one.now) for one in sure.bins if one.now] == [(0.59375, 0.5), (0.875, 0.5)]
    assert view.distributions == sorted(view.distributions, key=lambda one: -(one.distance or 0))

    moved, same = look(works, device="a"), look(works, query="id==b")
    assert (moved.now.devices, moved.reference.devices, same.now.devices) == (1, 1, 1)
    assert (values(moved)["input_drift"] or 0) > (values(view)["input_drift"] or 0) > 0.25
    assert set(values(same).values()) == {0.0}


def test_it_is_the_figure_that_the_alert_has(works: Clockwork) -> None:
    works.devices("a")
    works.rule(metric="input_drift", threshold=0.25, window_s=120)
    serve(works, "a")
    works.tick()
    works.now += 2 * HOUR
    serve(works, "a", middle=8.0)
    works.tick()
    with works.database.read() as session:
        alert = session.scalars(select(Alert)).one()
    assert alert.value == values(look(works, device="a"))["input_drift"]
    (row,) = listed(works.database)
    assert row.input_drift == alert.value


def test_a_device_that_is_off_is_not_taken_for_drift(works: Clockwork) -> None:
    works.devices("a", "b")
    works.rule(metric="input_drift", threshold=0.25, window_s=120)
    serve(works, "a")
    serve(works, "b", middle=8.0)
    works.tick()
    works.now += 2 * HOUR
    serve(works, "a")
    view = look(works)
    assert (view.reference.devices, values(view)["input_drift"]) == (1, 0.0)
    works.now += 2 * HOUR
    silent = look(works)
    assert (silent.now.requests, silent.reference.devices) == (0, 2)
    assert set(values(silent).values()) == {None}
    assert {one.now for found in silent.distributions for one in found.bins} == {None}


def test_without_a_reference_that_is_kept_the_first_windows_are_it(works: Clockwork) -> None:
    works.devices("a", "b")
    begun = works.now
    serve(works, "a")
    young = look(works)
    assert (young.reference.source, young.reference.since, young.now.requests) == (Source.NONE, None, 300)
    assert set(values(young).values()) == {None}
    serve(works, "b", windows=100, apart_s=60)
    serve(works, "a", middle=8.0)
    view = look(works)
    assert (view.reference.source, view.reference.since) == (Source.FIRST_WINDOWS, begun)
    assert view.reference.until == works.now - HOUR < begun + HOUR
    assert (view.reference.devices, view.now.devices) == (2, 2)
    assert (values(view)["input_drift"] or 0) > 0
    later = look(works, since=works.now - MINUTE, device="a")
    assert (later.reference.requests, later.reference.until) == (300, begun + MINUTE)
    assert (values(later)["input_drift"] or 0) > 0.25
    nothing = look(works, device="nobody")
    assert (nothing.reference.source, nothing.now.devices, nothing.distributions) == (Source.NONE, 0, [])


def test_times_are_checked(works: Clockwork) -> None:
    with pytest.raises(InvalidError, match="since: it must be before until"):
        look(works, since=works.now + HOUR)
    with pytest.raises(InvalidError, match="until: no such time"):
        look(works, until=dt.datetime(1, 1, 1, tzinfo=dt.UTC))


def test_however_much_there_is_only_some_of_it_is_read(works: Clockwork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "DEVICES", 3)
    monkeypatch.setattr(service, "WINDOWS", 12)
    works.devices(*"abcdef")
    serve(works, *"abcdef", windows=60, apart_s=60)
    view = look(works)
    assert (view.now.devices, view.now.requests) == (3, 600)
    monkeypatch.setattr(service, "MOST_WINDOWS", 2)
    assert look(works).now.requests == 300
    assert look(works, since=works.now - 5 * HOUR).now.requests <= 300


def test_a_device_that_makes_up_tensors_makes_no_long_answer(works: Clockwork) -> None:
    works.devices("a")
    for number in range(30):
        names = {f"t{number}-{one}": {"mean": {number_of(one + 1): 1}} for one in range(LIMITS.sketched_tensors)}
        window = ModelWindow("", "m", "1", "", "cpu", 1, 0, 0, 1, {}, (), inputs={**names, "x": {"mean": {1: 9}}})
        works.window("a", requests=1, signals=pack_signals(window, HostWindow()))
        works.now += MINUTE
    view = look(works)
    assert len(view.distributions) == LIMITS.sketched_tensors
    assert "x" in {one.tensor for one in view.distributions}


def test_what_moved_most_is_listed_first_each_model_once(works: Clockwork) -> None:
    works.devices("a", "b", "c")
    works.add(Fleet(id="other"))
    works.rule(metric="input_drift", threshold=0.25, window_s=120)
    serve(works, *"abc")
    serve(works, "c", model="n")
    works.tick()
    assert listed(works.database) == []
    works.tick()
    assert {(one.device_id, one.model): one.worst for one in listed(works.database)} == {
        ("a", "m"): 0.0, ("b", "m"): 0.0, ("c", "m"): 0.0, ("c", "n"): 0.0,
    }  # fmt: skip
    works.now += 2 * HOUR
    serve(works, "a", sure=0.6)
    serve(works, "b", middle=8.0)
    works.tick()
    found = listed(works.database)
    assert [(one.device_id, one.model) for one in found[:2]] == [("b", "m"), ("a", "m")]
    assert found[0].worst == found[0].input_drift
    assert found[1].worst == found[1].confidence_shift
    assert (found[0].version, found[0].requests, found[0].at - found[0].since) == ("1", 300, 2 * MINUTE)
    assert (found[0].at, found[2].at < works.now - HOUR) == (works.now, True)
    assert [one.device_id for one in listed(works.database, device_id="a")] == ["a"]
    assert [one.model for one in listed(works.database, model="n")] == ["n"]
    assert listed(works.database, version="2") == []
    with works.database.read() as session:
        condition = devices.query_condition(session, DEFAULT_FLEET, "id==c", field="query")
        bounds = service.Thresholds(session, DEFAULT_FLEET)
    assert {one.device_id for one in listed(works.database, devices=condition)} == {"c"}
    assert [service.row(one, bounds).over for one in found] == [True, False, False, False]

    serve(works, "b", deployment="next", middle=8.0)
    works.tick()  # it has another reference now
    works.tick()
    assert [one.worst for one in listed(works.database, device_id="b")] == [0.0]
    works.change("a", online=False)
    with works.database.write() as session:
        devices.forget_device(session, DEFAULT_FLEET, "a", actor="test")
    assert "a" not in {one.device_id for one in listed(works.database)}


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_no_question_reads_a_whole_table(database: Database) -> None:
    now = utc_now()
    with database.read() as session:
        wanted = (
            (some_windows_query([1, 2], [(now - HOUR, now), (now, now + HOUR)]), "INDEX"),
            (extents_query([1, 2], None, now), "COVERING INDEX"),
            (extents_query([1, 2], now - HOUR, now), "COVERING INDEX"),
        )
        for query, kind in wanted:
            plan = explained(session, query)
            assert any(f"{kind} ix_model_windows_series_id_ended_at (series_id=? AND ended_at" in one for one in plan)
            whole = [
                one for one in plan if one.startswith("SCAN") and one.split()[1] not in {"picked", "spans", "CONSTANT"}
            ]
            assert whole == [], plan


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_postgresql_finds_each_window_by_the_index(works: Clockwork) -> None:
    """Its planner would rather join all windows, had it the choice."""
    works.devices(*(f"d-{number}" for number in range(40)))
    with works.database.write() as session:
        group = TelemetryGroup(fleet_id=DEFAULT_FLEET)
        session.add(group)
        session.flush()
        for number in range(40):
            series = TelemetrySeries(
                fleet_id=DEFAULT_FLEET, device_id=f"d-{number}", model="m", version="1", deployment_id="", digest="",
                provider="cpu",
            )  # fmt: skip
            session.add(series)
            session.flush()
            plain = {"requests": 1, "errors": 0, "rejected": 0, "items": 1, "latency": b"", "confusion": b""}
            rows = [
                {
                    "group_id": group.id, "number": 500 * number + one, "series_id": series.id, **plain,
                    "started_at": works.ago(10 * one + 10), "ended_at": works.ago(10 * one),
                }
                for one in range(500)
            ]  # fmt: skip
            session.execute(insert(ModelWindowRow), rows)
    with works.database.write() as session:
        session.execute(text("ANALYZE"))
        ids = list(session.scalars(select(TelemetrySeries.id).limit(20)))
        now = works.now
        query = some_windows_query(ids, [(now - 5 * MINUTE, now), (now - 10 * MINUTE, now - 5 * MINUTE)])
        assert len(session.execute(query).all()) == 40
        made = query.compile(session.get_bind(), compile_kwargs={"render_postcompile": True})
        rows = session.connection().exec_driver_sql(f"EXPLAIN {made}", made.params)
        plan = "\n".join(row[0] for row in rows)
    assert "Seq Scan on model_windows" not in plan, plan


def test_over_http(tmp_path: Path) -> None:
    with rest.serving(tmp_path, None, alert_tick_s=60) as application:
        works, api = Clockwork(application.state.database), rest.caller(application)
        works.now = utc_now() - 5 * HOUR
        works.devices("a")
        model = Model(fleet_id=DEFAULT_FLEET, name="m")
        works.add(model)
        works.add(Version(fleet_id=DEFAULT_FLEET, model_id=model.id, name="1", inputs=[], outputs=[], labels=["cat"]))
        works.rule(metric="input_drift", threshold=0.25, window_s=120)
        serve(works, "a")
        with works.database.write() as session:
            found = session.scalars(select(AlertRule).where(AlertRule.name == "r")).one()
            found.clock_at, rule = works.now, found.id
        evaluate(works.database, SETTINGS, rule, works.now)
        works.now = utc_now() - MINUTE
        serve(works, "a", middle=8.0)
        evaluate(works.database, SETTINGS, rule, works.now)
        found = api.get("/models/m/versions/1/drift", params={"device": "a", "query": "id==a"})
        assert found.status_code == 200, found.text
        view = found.json()
        assert view["reference"]["source"] == "kept"
        assert {one["metric"]: one["threshold"] for one in view["figures"]} == {
            "input_drift": 0.25, "output_drift": None, "confidence_shift": None,
        }  # fmt: skip
        assert {label for one in view["distributions"] for label in [part["label"] for part in one["bins"]]} >= {
            "cat",
            "1",
        }
        (row,) = api.get("/drift").json()["items"]
        assert (row["device_id"], row["over"], row["worst"]) == ("a", True, row["input_drift"])
        assert row["input_drift"] == view["figures"][0]["value"]
        for path, status, code in (
            ("/models/m/versions/2/drift", 404, "version_not_found"),
            ("/models/n/versions/1/drift", 404, "model_not_found"),
            ("/models/m/versions/1/drift?query=site=", 422, "bad_query"),
            ("/models/m/versions/1/drift?since=2999-01-01T00:00:00", 422, "bad_series"),
            ("/drift?query=x", 422, "bad_query"),
        ):
            refused = api.get(path)
            assert (refused.status_code, refused.json()["code"]) == (status, code), path
        assert api.get("/drift", params={"since": utc_now().isoformat()}).json()["items"] == []
