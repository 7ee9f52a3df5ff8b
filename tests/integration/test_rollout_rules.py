"""Rollouts and deployments as rows: every way one goes, on SQLite and PostgreSQL, with devices that only report."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.protocol.codec import decode
from agent.protocol.errors import WireErrorCode
from agent.protocol.facts import DeviceFacts, RuntimeFacts
from agent.protocol.lifecycle import Phase
from agent.protocol.manifest import Manifest, ModelFormat, Precision, RuntimeName, TensorSpec
from agent.protocol.messages import (
    DeploymentReport,
    DesiredState,
    Failure,
    HostWindow,
    ModelWindow,
    OnProviderMissing,
    ProbationPolicy,
    ProbationReport,
    Reported,
    TelemetryBatch,
)
from agent.protocol.topics import DeviceTopic, device_topic
from agent.protocol.version import SPOKEN
from fleet_server import outbox
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.devices import service as devices
from fleet_server.devices.schemas import ProfileCreate
from fleet_server.domain.states import TRANSITIONS, RolloutState
from fleet_server.errors import ConflictError, FleetError, InvalidError, NotFoundError
from fleet_server.models import Deployment, Device, Model, Rollout, Variant, Version
from fleet_server.paging import PageRequest
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.rollouts import repository, service, views
from fleet_server.rollouts.engine import advance
from fleet_server.rollouts.schemas import RolloutCreate, RolloutView
from fleet_server.settings import Settings
from fleet_server.telemetry import service as telemetry
from tests.reporting import apply_report

SETTINGS = Settings(state_dir=Path(tempfile.mkdtemp(prefix="shoal-rules-")))  # of the keys alone
HALVES = {"stages": [{"percent": 50}, {"percent": 100}]}
TENSOR = TensorSpec("x", "float32", (-1, 8))
FACTS = DeviceFacts(  # of a device that has the profile's runtime
    agent_version="1", os="", kernel="", arch="x86_64", cpu_model="", cpu_cores=1, cpu_features=(),
    memory_mb=1, disk_free_mb=1, runtimes=(RuntimeFacts("onnx", "onnxruntime", "1", ("cpu",)),),
)  # fmt: skip


class World:
    """A model with versions 1 to 3 that are ready for one profile, and four devices that have it."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._sequences: dict[str, int] = {}
        with database.write() as session:
            profile = devices.create_profile(
                session, DEFAULT_FLEET, ProfileCreate(name="p", runtime=RuntimeName.ONNX), actor="test"
            )
            model = Model(fleet_id=DEFAULT_FLEET, name="m")
            session.add(model)
            session.flush()
            for number in "123":
                version = Version(fleet_id=DEFAULT_FLEET, model_id=model.id, name=number, inputs=[], outputs=[])
                session.add(version)
                session.flush()
                variant = Variant(
                    fleet_id=DEFAULT_FLEET,
                    version_id=version.id,
                    profile_id=profile.id,
                    profile_spec=profile.spec,
                    state="ready",
                    measurements={"accuracy": 0.9, "memory_mb": 40.0},
                )
                session.add(variant)
                session.flush()
                manifest = Manifest(
                    digest=number * 64, size=1, chunk_size=1, model="m", version=number, variant_id=variant.id,
                    profile="p", format=ModelFormat.ONNX, runtime=RuntimeName.ONNX, precision=Precision.FP32,
                    inputs=(TENSOR,), outputs=(TENSOR,),
                )  # fmt: skip
                variant.digest, variant.size, variant.manifest = manifest.digest, 1, msgspec.to_builtins(manifest)
        for name in "abcd":
            self.report(name)

    def report(self, device: str, *deployments: DeploymentReport, held: tuple[str, ...] = ()) -> None:
        """What the device says; once said to have a profile's runtime, it has that profile."""
        self._sequences[device] = self._sequences.get(device, 0) + 1
        reported = Reported(SPOKEN, "boot", self._sequences[device], 0, FACTS, deployments, held=held)
        with self.database.write() as session:
            apply_report(session, SETTINGS, device, reported, utc_now())

    def create(self, version: str, **fields: Any) -> str:
        wanted = RolloutCreate.model_validate(
            {"version": f"m@{version}", "target": {"all": True}, "allow_unproven": True, **fields}
        )
        with self.database.write() as session:
            return service.create(session, SETTINGS, DEFAULT_FLEET, wanted, actor="test").id

    def messages(self, device: str) -> list[DesiredState]:
        """What waits to be sent to the device: one state at most, the newest."""
        topic = device_topic(device, DeviceTopic.DESIRED)
        with self.database.read() as session:
            found = [one for one in outbox.pending(session, limit=1000) if one.topic == topic]
        assert len(found) <= 1
        return [decode(one.payload, DesiredState) for one in found]

    def revision(self, device: str) -> int:
        return self.messages(device)[0].revision

    def desired(self, device: str) -> dict[str, str]:
        """Version by deployment id, as the newest message for the device says."""
        found = self.messages(device)
        if not found:
            return {}
        (state,) = found
        return {one.deployment_id: one.read_manifest().version for one in state.deployments}

    def goes(self, device: str, phase: Phase, version: str | None = None) -> None:
        """The device reports a phase of the one deployment it was sent."""
        ((deployment, sent),) = self.desired(device).items()
        assert version is None or sent == version
        failure = Failure(WireErrorCode.LOAD_FAILED, "it does not load") if phase is Phase.FAILED else None
        self.report(device, DeploymentReport(deployment, "m", sent, sent * 64, phase, failure=failure))

    def tick(self, rollout: str) -> RolloutView:
        with self.database.write() as session:
            advance(session, SETTINGS, session.get_one(Rollout, rollout))
        return self.view(rollout)

    def view(self, rollout: str) -> RolloutView:
        with self.database.read() as session:
            return views.rollout_view(session, session.get_one(Rollout, rollout))

    def act(self, rollout: str, action: Callable[..., None], *arguments: Any, **options: Any) -> RolloutView:
        with self.database.write() as session:
            action(session, *arguments, session.get_one(Rollout, rollout), **options)
        return self.view(rollout)

    def phases(self, rollout: str) -> dict[str, str]:
        with self.database.read() as session:
            rows = session.query(Deployment).filter_by(rollout_id=rollout, revert_of="").all()
            return {row.device_id: row.phase for row in rows}

    def run(self, version: str) -> str:
        """A rollout that every device took."""
        rollout = self.create(version, strategy={"stages": [{"percent": 100}]})
        for device in "abcd":
            self.goes(device, Phase.ACTIVE, version)
        assert self.tick(rollout).state == "succeeded"
        return rollout


@pytest.fixture
def world(database: Database) -> World:
    return World(database)


def decisions(view: RolloutView) -> list[str]:
    return [verdict.decision for verdict in view.verdicts]


def test_stage_after_stage_to_the_end(world: World) -> None:
    rollout = world.create("1", strategy=HALVES)
    first = {device for device in "abcd" if world.desired(device)}
    assert len(first) == 2
    assert world.phases(rollout) == {device: "pending" if device in first else "scheduled" for device in "abcd"}
    for device in sorted(first):
        assert world.tick(rollout).stage == 0
        world.goes(device, Phase.DOWNLOADING, "1")
        world.goes(device, Phase.ACTIVE)
    assert world.tick(rollout).stage == 1
    for device in set("abcd") - first:
        world.goes(device, Phase.ACTIVE, "1")
    done = world.tick(rollout)
    assert (done.state, done.counts.active, done.counts.total) == ("succeeded", 4, 4)
    assert decisions(done) == ["start", "advance", "succeed"]
    assert done.finished_at is not None


def test_what_is_exposed_is_on_its_way_and_the_stage_waits_for_it(world: World) -> None:
    rollout = world.create("1", strategy=HALVES)
    first = sorted(device for device in "abcd" if world.desired(device))
    for device in first:
        world.goes(device, Phase.EXPOSED, "1")
    waiting = world.tick(rollout)
    assert (waiting.stage, waiting.counts.in_progress) == (0, 2)
    assert {world.phases(rollout)[device] for device in first} == {"exposed"}
    for device in first:
        world.goes(device, Phase.ACTIVE, "1")
    assert world.tick(rollout).stage == 1


def test_a_failed_device_takes_the_others_back_to_what_they_ran(world: World) -> None:
    world.run("1")
    rollout = world.create("2", strategy=HALVES)
    first, second = sorted(device for device in "abcd" if list(world.desired(device).values()) == ["2"])
    world.goes(first, Phase.ACTIVE)
    world.goes(second, Phase.FAILED)
    reverting = world.tick(rollout)
    assert reverting.state == "reverting"
    assert "failed_percent above 5: 1 of 2 deployments, 50 %" in reverting.verdicts[-1].reason
    assert set(world.phases(rollout).values()) == {"active", "failed", "superseded"}
    assert world.tick(rollout).state == "reverting", "it waits for the devices"
    for device in "abcd":
        assert list(world.desired(device).values()) == ["1"], device
    for device in (first, second):
        world.goes(device, Phase.ACTIVE, "1")
    reverted = world.tick(rollout)
    assert (reverted.state, reverted.counts.failed, reverted.counts.active) == ("reverted", 1, 1)
    assert decisions(reverted) == ["start", "revert", "reverted"]


def test_what_a_device_took_back_it_is_told_no_more(world: World) -> None:
    world.run("1")
    ones = {device: next(iter(world.desired(device))) for device in "abcd"}
    rollout = world.create("2", strategy=HALVES)
    first, second = sorted(device for device in "abcd" if list(world.desired(device).values()) == ["2"])
    ((deployment, _),) = world.desired(first).items()
    before = DeploymentReport(ones[first], "m", "1", "1" * 64, Phase.ACTIVE)
    seen = ProbationReport(watched_s=3.0, requests=9, errors=9, latency_p95_ms=1.5, provider="cpu", exercised=True)
    why = Failure(WireErrorCode.PROBATION_FAILED, "9 of 9 requests failed while the version was watched")
    bad = DeploymentReport(deployment, "m", "2", "2" * 64, Phase.ROLLED_BACK, failure=why, probation=seen)
    world.report(first, before, bad)
    assert world.desired(first) == {ones[first]: "1"}
    revision = world.revision(first)
    world.report(first, before, bad)
    assert world.revision(first) == revision, "it is told once"
    world.goes(second, Phase.ACTIVE, "2")
    reverting = world.tick(rollout)
    assert (reverting.state, reverting.counts.failed) == ("reverting", 1)
    assert "1 of 2 deployments, 50 %" in reverting.verdicts[-1].reason
    world.goes(second, Phase.ACTIVE, "1")
    reverted = world.tick(rollout)
    assert reverted.state == "reverted"
    assert reverted.verdicts[-1].reason == (
        "1 of 1 devices run again what they ran before, 1 went back by themselves or never left it"
    )
    with world.database.read() as session:
        rows = repository.deployments_page(session, DEFAULT_FLEET, PageRequest(10), device_id=first).items
        shown = next(view for view in map(views.deployment_view, rows) if view.id == deployment)
        backs = [row[0] for row in rows if row[0].revert_of]
    assert backs == [], "it needed nobody to take it back"
    assert shown.failure is not None
    assert (shown.failure.code, shown.desired) == ("probation_failed", False)
    assert shown.probation is not None
    assert (shown.probation.requests, shown.probation.exercised) == (9, True)
    third = world.create("2", strategy={"stages": [{"percent": 100}]})
    ((again, _),) = world.desired(first).items()
    assert again != deployment, "a new rollout is a new try"
    world.act(third, lambda session, row: service.abort(session, SETTINGS, row, revert=True, actor="test"))
    assert list(world.desired(first).values()) == ["1"]


def test_an_active_version_that_a_device_loses_later_brings_the_one_before_back(world: World) -> None:
    """Its record of the one before has ended: under the same id it would not be begun again."""
    world.run("1")
    old = next(iter(world.desired("a")))
    world.run("2")
    ((new, _),) = world.desired("a").items()
    ended = DeploymentReport(old, "m", "1", "1" * 64, Phase.SUPERSEDED)
    why = Failure(WireErrorCode.LOAD_FAILED, "its runtime is gone")
    world.report("a", ended, DeploymentReport(new, "m", "2", "2" * 64, Phase.ROLLED_BACK, failure=why))
    ((again, version),) = world.desired("a").items()
    assert version == "1"
    assert again not in {old, new}
    world.goes("a", Phase.FAILED)
    assert world.desired("a") == {}, "it is not sent for ever"


def test_a_rollout_says_how_devices_watch(world: World) -> None:
    def policy(**probation: Any) -> ProbationPolicy:
        strategy = {"stages": [{"percent": 100}], "probation": probation}
        world.create("1", strategy=strategy, on_busy="supersede")
        (state,) = world.messages("a")
        (deployment,) = state.deployments
        assert deployment.probation is not None
        assert deployment.probation_s == deployment.probation.seconds, "for agents that know no more"
        return deployment.probation

    assert policy() == ProbationPolicy(seconds=SETTINGS.probation_s, load_mb=40.0)
    assert policy(
        seconds=60,
        at_most_s=900,
        minimum_requests=50,
        error_percent=5,
        latency_p95_ratio=1.5,
        memory_mb=200,
        growth_mb=0,
        on_memory_short="replace",
        on_provider_missing="keep_old",
    ) == ProbationPolicy(
        60, 50, 900, 0.05, 1.5, 200, 0, 40.0,
        replace_when_short=True, on_provider_missing=OnProviderMissing.KEEP_OLD,
    )  # fmt: skip
    with world.database.write() as session:
        for variant in session.query(Variant):
            variant.profile_spec = {**variant.profile_spec, "budgets": {"memory_mb": 100}}
    assert policy().memory_mb == 164, "the profile's budget, and room to breathe"


def test_what_takes_a_device_back_may_be_slower(world: World) -> None:
    world.run("1")
    second = world.run("2")
    world.act(second, lambda session, row: service.abort(session, SETTINGS, row, revert=True, actor="test"))
    (state,) = world.messages("a")
    assert state.deployments[0].read_manifest().version == "1"
    policy = state.deployments[0].policy
    assert (policy.latency_ratio, policy.error_share, policy.growth_mb, policy.memory_mb) == (0.0, 1.0, 0.0, None)


def test_where_nothing_ran_before_the_model_is_taken_off(world: World) -> None:
    rollout = world.create("1", strategy={**HALVES, "on_stop": "revert"})
    first = [device for device in "abcd" if world.desired(device)]
    for device in first:
        world.goes(device, Phase.FAILED)
    assert world.tick(rollout).state == "reverting"
    assert [world.desired(device) for device in first] == [{}, {}]
    assert world.tick(rollout).state == "reverted"


def test_a_stop_rule_may_pause_and_a_person_goes_on(world: World) -> None:
    rollout = world.create("1", strategy={**HALVES, "on_stop": "pause"})
    first, second = [device for device in "abcd" if world.desired(device)]
    world.goes(first, Phase.ACTIVE)
    world.goes(second, Phase.FAILED)
    assert world.tick(rollout).state == "paused"
    assert world.tick(rollout).state == "paused", "a tick leaves a paused one alone"
    world.act(rollout, lambda session, row: service.resume(session, SETTINGS, row, actor="test"))
    assert world.tick(rollout).state == "paused", "the rule still holds"
    stopped = world.act(rollout, lambda session, row: service.abort(session, SETTINGS, row, revert=False, actor="test"))
    assert (stopped.state, stopped.counts.active, stopped.counts.superseded) == ("stopped", 1, 2)
    assert list(world.desired(first).values()) == ["1"], "who has it keeps it"


def test_a_paused_rollout_sends_no_further_stage(world: World) -> None:
    rollout = world.create("1", strategy=HALVES)
    first = [device for device in "abcd" if world.desired(device)]
    world.act(rollout, lambda session, row: service.pause(session, row, "asked to pause", actor="test"))
    for device in first:
        world.goes(device, Phase.ACTIVE)
    assert world.tick(rollout).stage == 0
    world.act(rollout, lambda session, row: service.resume(session, SETTINGS, row, actor="test"))
    assert world.tick(rollout).stage == 1


def test_a_rollout_that_succeeded_can_still_be_taken_back(world: World) -> None:
    world.run("1")
    second = world.run("2")
    world.act(second, lambda session, row: service.abort(session, SETTINGS, row, revert=True, actor="test"))
    for device in "abcd":
        world.goes(device, Phase.ACTIVE, "1")
    assert world.tick(second).state == "reverted"
    third = world.create("3")
    world.act(third, lambda session, row: service.abort(session, SETTINGS, row, revert=True, actor="test"))
    assert all(list(world.desired(device).values()) == ["1"] for device in "abcd"), "what truly ran, not what was tried"


def test_errors_in_telemetry_stop_a_rollout(world: World) -> None:
    rule = {"metric": "error_percent", "above": 1, "min_samples": 100}
    rollout = world.create("1", strategy={"stages": [{"percent": 100, "soak_s": 3600}], "stop_when": [rule]})
    for device in "abcd":
        world.goes(device, Phase.ACTIVE)
    (deployment,) = world.desired("a")

    def measured(sequence: int, requests: int, errors: int) -> None:
        window = ModelWindow("m", "1", "1" * 64, deployment, "cpu", requests=requests, errors=errors)
        now = utc_now()
        batch = TelemetryBatch(SPOKEN, "s", sequence, now.timestamp() - 1, now.timestamp(), (window,), HostWindow())
        with world.database.write() as session:
            telemetry.store_batch(session, "a", batch, now)

    measured(1, 99, 99)
    assert world.tick(rollout).state == "running", "too few to judge"
    measured(2, 1, 0)
    stopped = world.tick(rollout)
    assert stopped.state == "reverting"
    assert (
        "error_percent above 1: 99 over 100 samples of 1 devices; evidence more than 1000000 to 1"
        in stopped.verdicts[-1].reason
    )


def test_reports_that_were_coalesced_are_believed_and_impossible_ones_are_not(world: World) -> None:
    rollout = world.create("1", strategy={"stages": [{"percent": 100}]})
    (sent,) = world.desired("a")
    world.goes("a", Phase.PROBATION)
    world.goes("a", Phase.ROLLED_BACK)
    world.report("a", DeploymentReport(sent, "m", "1", "1" * 64, Phase.ACTIVE))
    assert world.phases(rollout)["a"] == "rolled_back", "an end is an end"
    (others,) = world.desired("b")
    world.report("c", DeploymentReport(others, "m", "1", "1" * 64, Phase.FAILED))
    assert world.phases(rollout)["b"] == "pending", "a device speaks for itself only"
    world.report("d", DeploymentReport("unknown", "m", "1", "1" * 64, Phase.FAILED))
    assert world.phases(rollout)["d"] == "pending"


@pytest.mark.parametrize(
    ("fields", "error", "code"),
    [
        ({"version": "m@9"}, NotFoundError, "version_not_found"),
        ({"target": {"devices": ["a", "nobody"]}}, NotFoundError, "device_not_found"),
        ({"target": {"profiles": ["nowhere"]}}, NotFoundError, "profile_not_found"),
        ({"target": {"tags": {"site": "nowhere"}}}, InvalidError, "no_device"),
        ({"target": {"devices": ["a", "stranger"]}}, ConflictError, "device_without_profile"),
        ({"version": "m@3"}, ConflictError, "no_variant_for_profile"),
        ({}, ConflictError, "device_busy"),
    ],
)
def test_what_is_refused_changes_nothing(
    world: World, fields: dict[str, Any], error: type[FleetError], code: str
) -> None:
    busy = world.create("1", target={"devices": ["a"]})
    with world.database.write() as session:
        session.add(Device(id="stranger", fleet_id=DEFAULT_FLEET))
        version = session.query(Version).filter_by(name="3").one()
        session.query(Variant).filter_by(version_id=version.id).one().state = "refused"
    wanted = {"target": {"devices": ["b"]} if "version" in fields else {"devices": ["a"]}, **fields}
    with pytest.raises(error) as raised:
        world.create(str(wanted.pop("version", "m@2")).removeprefix("m@"), **wanted)
    assert raised.value.code == code
    with world.database.read() as session:
        assert [row.id for row in session.query(Rollout)] == [busy]
        assert session.query(Deployment).count() == 1


def test_states_go_only_where_the_table_leads(world: World) -> None:
    rollout = world.run("1")

    def finish(state: RolloutState, wanted: RolloutState) -> None:
        with world.database.write() as session:
            session.get_one(Rollout, rollout).state = state.value
            service.finish(session, session.get_one(Rollout, rollout), wanted, "test", "test")

    for state in RolloutState:
        for wanted in RolloutState:
            if wanted in TRANSITIONS[state]:
                finish(state, wanted)
                assert world.view(rollout).state == wanted
            else:
                before = world.view(rollout)
                with pytest.raises(ConflictError, match=f"{state.value}.*{wanted.value}"):
                    finish(state, wanted)
                assert world.view(rollout) == before
