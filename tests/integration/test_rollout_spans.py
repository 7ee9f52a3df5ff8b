"""Spans of a rollout out of what devices report, on SQLite and PostgreSQL: once, of what was committed, in bounds."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import select

from agent.protocol.codec import encode
from agent.protocol.errors import WireErrorCode
from agent.protocol.lifecycle import Phase
from agent.protocol.messages import DeploymentReport, Failure, Reported
from agent.protocol.topics import DeviceTopic, device_topic
from agent.protocol.trace import SWITCHED, Mark, TraceReport, parse_traceparent
from fleet_server import outbox
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.domain.states import RolloutState
from fleet_server.enrolment.service import Authority
from fleet_server.gateway import reports as handling
from fleet_server.gateway.conduct import Conduct
from fleet_server.gateway.delivery import Delivery
from fleet_server.gateway.handlers import Handlers
from fleet_server.gateway.inbox import Message
from fleet_server.gateway.publishing import spans_of
from fleet_server.models import Deployment, Device, Model, Profile, Rollout, Variant, Version
from fleet_server.outbox import PendingMessage
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.rollouts import service, tracing
from fleet_server.samples.receiving import Receiving
from fleet_server.settings import Settings
from fleet_server.spans import Kind, Span, span_id_of
from fleet_server.trust.ca import FleetCa
from tests.databases import short_on_sqlite
from tests.integration.test_device_messages import HELLO

TRACE, ROOT, SENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", "00f067aa0ba902b7"
MARKS = (Mark("pending", 9.0), Mark("downloading", 8.0), Mark("verifying", 5.0), Mark("loading", 4.0))
SERVED = (*MARKS, Mark("probation", 2.0), Mark(SWITCHED, 1.5), Mark("active", 0.0))


class Traced:
    """A device with a deployment that is under way, of a rollout that is traced; and what is exported."""

    def __init__(self, url: str, folder: Path, *, traceparent: str | None = f"00-{TRACE}-{ROOT}-01") -> None:
        self.spans: list[Span] = []
        self.database = Database(url, self.spans.extend)
        authority = Authority(FleetCa.open(folder / "ca", DEFAULT_FLEET), dt.timedelta(days=1), 10)
        store = ArtifactStore.open(None, folder=folder)
        self.handlers = Handlers(
            self.database, Settings(), Delivery(store, lambda *_: False, None), authority, Conduct(self.database),
            Receiving(self.database, store.below("samples"), folder), lambda *_: True,
        )  # fmt: skip
        self._sequence = 1
        fleet: Any = {"fleet_id": DEFAULT_FLEET}
        with self.database.write() as session:

            def add(row: Any) -> Any:
                session.add(row)
                session.flush()
                return row

            add(Device(id="dev-1", **fleet))
            model = add(Model(**fleet, name="m"))
            version = add(Version(**fleet, model_id=model.id, name="1", inputs=[], outputs=[]))
            profile = add(Profile(**fleet, name="any", spec={"match": {}, "runtime": "onnx"}))
            variant = add(Variant(**fleet, version_id=version.id, profile_id=profile.id, state="ready",
                                  profile_spec={"match": {}, "runtime": "onnx"}))  # fmt: skip
            sent_at = utc_now() - dt.timedelta(seconds=10)
            began = utc_now() - dt.timedelta(seconds=20)
            rollout = add(Rollout(**fleet, name="m@1", version_id=version.id, state="running", target={"all": True},
                                  strategy={"stages": [{"percent": 50}, {"percent": 100}]}, traceparent=traceparent,
                                  created_at=began, stage_started_at=began, began_at=began))  # fmt: skip
            self.rollout = rollout.id
            self.deployment = add(
                Deployment(**fleet, rollout_id=rollout.id, device_id="dev-1", model_id=model.id, version_id=version.id,
                           variant_id=variant.id, stage=0, phase="pending", sent_at=sent_at)
            ).id  # fmt: skip

    def say(self, phase: Phase, **fields: Any) -> None:
        self._sequence += 1
        one = DeploymentReport(self.deployment, "m", "1", "a" * 64, phase, **fields)
        said: Reported = msgspec.structs.replace(HELLO, sequence=self._sequence, deployments=(one,))
        self.handlers.handle(Message(device_topic("dev-1", DeviceTopic.REPORTED), encode(said)))

    def named(self, name: str) -> Span:
        [found] = [one for one in self.spans if one.name == name]
        return found


@pytest.fixture
def traced(database: Database, tmp_path: Path) -> Iterator[Traced]:
    found = Traced(database.engine.url.render_as_string(hide_password=False), tmp_path)
    yield found
    found.database.dispose()


def trace(marks: tuple[Mark, ...], parent: str = f"00-{TRACE}-{SENT}-01") -> TraceReport:
    return TraceReport(parent, marks)


@short_on_sqlite("database")
def test_what_a_device_did_hangs_below_the_message_that_brought_it(traced: Traced) -> None:
    traced.say(Phase.DOWNLOADING, trace=trace(MARKS[:2]))
    assert [one.name for one in traced.spans] == ["report downloading"]
    traced.say(Phase.ACTIVE, trace=trace(SERVED))
    run = traced.named("run m@1")
    assert (run.trace_id, run.parent_id, run.service, run.instance) == (TRACE, SENT, "shoal-agent", "dev-1")
    steps = [one for one in traced.spans if one.parent_id == run.span_id and one.service == "shoal-agent"]
    assert [one.name for one in steps] == ["trust", "download", "verify", "load", "switch", "probation"]
    lengths = [round((one.ended_at or 0) - one.started_at, 3) for one in steps]
    assert lengths == [1.0, 3.0, 1.0, 2.0, 0.5, 1.5]
    deployment = traced.named("deployment")
    assert deployment.span_id == span_id_of("deployment", traced.deployment)
    assert deployment.parent_id == span_id_of("stage", traced.rollout, 0)
    assert deployment.started_at < run.started_at
    handled = traced.named("report active")
    assert (handled.kind, handled.parent_id) == (Kind.CONSUMER, run.span_id)
    assert handled.ended_at is not None
    assert handled.ended_at >= handled.started_at
    assert {one.trace_id for one in traced.spans} == {TRACE}
    count = len(traced.spans)
    traced.say(Phase.ACTIVE, trace=trace(SERVED))
    assert len(traced.spans) == count, "what is said again makes no span again"


@short_on_sqlite("database")
def test_a_failure_is_told_with_its_reason(traced: Traced) -> None:
    failure = Failure(WireErrorCode.LOAD_FAILED, "the runtime refuses it")
    traced.say(Phase.FAILED, failure=failure, trace=trace((*MARKS, Mark("failed", 0.0))))
    assert traced.named("deployment").problem == traced.named("run m@1").problem == "the runtime refuses it"
    assert "switch" not in {one.name for one in traced.spans}


@short_on_sqlite("database")
def test_a_version_that_was_taken_back_before_it_answered_was_watched_and_not_switched(traced: Traced) -> None:
    failure = Failure(WireErrorCode.PROBATION_FAILED, "too slow")
    marks = (*MARKS, Mark("probation", 2.0), Mark("rolled_back", 0.0))
    traced.say(Phase.ROLLED_BACK, failure=failure, trace=trace(marks))
    assert traced.named("probation").problem == ""
    assert "switch" not in {one.name for one in traced.spans}


@short_on_sqlite("database")
def test_a_device_that_knows_no_traces_leaves_its_part_out(traced: Traced) -> None:
    traced.say(Phase.ACTIVE)
    assert {one.name for one in traced.spans} == {"deployment", "report active"}
    assert traced.named("report active").parent_id == traced.named("deployment").span_id


@short_on_sqlite("database")
@pytest.mark.parametrize("parent", ["", "rubbish", f"00-{'1' * 32}-{SENT}-01"])
def test_a_device_names_no_trace_but_its_own(traced: Traced, parent: str) -> None:
    traced.say(Phase.ACTIVE, trace=trace(SERVED, parent))
    run = traced.named("run m@1")
    assert (run.trace_id, run.parent_id) == (TRACE, span_id_of("deployment", traced.deployment))


@short_on_sqlite("database")
def test_what_could_not_be_taken_in_left_no_span(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("after the deployment was moved")

    with monkeypatch.context() as patch:
        patch.setattr(handling.gates, "apply_reports", fails)
        traced.say(Phase.ACTIVE, trace=trace(SERVED))
    assert traced.spans == []
    traced.say(Phase.ACTIVE, trace=trace(SERVED))
    assert traced.named("deployment")


@short_on_sqlite("database")
def test_a_rollout_that_nobody_traces_makes_none(database: Database, tmp_path: Path) -> None:
    found = Traced(database.engine.url.render_as_string(hide_password=False), tmp_path, traceparent=None)
    found.say(Phase.ACTIVE, trace=trace(SERVED))
    with found.database.write() as session:
        rollout = session.get_one(Rollout, found.rollout)
        assert tracing.traceparent_for(rollout) == ""
        service.finish(session, rollout, RolloutState.SUCCEEDED, "succeed", "all of it")
    found.database.dispose()
    assert found.spans == []


@short_on_sqlite("database")
def test_a_rollout_ends_once_with_every_stage_that_began(traced: Traced) -> None:
    with traced.database.write() as session:
        service.promote(session, Settings(), session.get_one(Rollout, traced.rollout), full=True, actor="ada")
    assert [one.attributes["shoal.stage"] for one in traced.spans] == [0]
    with traced.database.write() as session:
        service.finish(session, session.get_one(Rollout, traced.rollout), RolloutState.STOPPED, "stop", "5 % failed")
    stages = [one for one in traced.spans if one.name == "stage"]
    assert [one.attributes["shoal.stage"] for one in stages] == [0, 1]
    rollout = traced.named("rollout")
    assert {one.parent_id for one in stages} == {rollout.span_id}
    assert (rollout.parent_id, rollout.problem) == (ROOT, "5 % failed")
    assert rollout.started_at < stages[0].started_at + 1


@short_on_sqlite("database")
def test_the_message_to_a_device_has_a_span_until_the_broker_has_it(traced: Traced) -> None:
    with traced.database.read() as session:
        text = tracing.traceparent_for(session.get_one(Rollout, traced.rollout))
        assert text != tracing.traceparent_for(session.get_one(Rollout, traced.rollout)), "another one each time"
    own = parse_traceparent(text)
    assert own is not None
    payload = msgspec.json.encode(
        {"revision": 1, "deployments": [{"deployment_id": traced.deployment, "traceparent": text, "manifest": {}},
                                        {"deployment_id": "old", "manifest": {}}]}
    )  # fmt: skip
    message = PendingMessage("1", device_topic("dev-1", DeviceTopic.DESIRED), payload, retain=True)
    [span] = spans_of(message, 5.0)
    assert (span.trace_id, span.span_id, span.kind) == (TRACE, own.span_id, Kind.PRODUCER)
    assert span.parent_id == span_id_of("deployment", traced.deployment)
    assert spans_of(PendingMessage("2", "elsewhere", payload, retain=True), 5.0) == []
    assert spans_of(PendingMessage("3", message.topic, b"rubbish", retain=True), 5.0) == []
    with traced.database.read() as session:
        assert session.scalars(select(Deployment.id)).one() == traced.deployment
        assert outbox.pending(session, limit=1) == []
