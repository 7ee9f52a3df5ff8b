"""Versions beside the one that serves: what follows from each event, which requests are picked, how answers compare."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.protocol.codec import decode, encode
from agent.protocol.errors import WireError, WireErrorCode
from agent.protocol.histogram import bucket_of
from agent.protocol.lifecycle import Phase
from agent.protocol.messages import DesiredDeployment, DesiredState, Exposure, ExposureMode, ProbationPolicy
from agent.protocol.version import SPOKEN
from agent.runtimes.base import Tensors
from agent.serving.comparison import disagreements
from agent.serving.exposure import WAITING, WAITING_BYTES, Beside
from agent.serving.ipc import Counts, Peeked
from agent.serving.models import LoadedModel
from agent.serving.registry import Registry
from agent.trial import golden
from agent.update.effects import (
    ActivateArtifact,
    BeginProbation,
    CheckTrust,
    Download,
    Effect,
    ExposeArtifact,
    LetServe,
    LoadArtifact,
    StopDownload,
    UnloadArtifact,
)
from agent.update.probation import Probation
from agent.update.updater import Updater
from tests.fleet import wait_until
from tests.unit.agent.test_serving_models import Doubling
from tests.unit.agent.test_serving_models import manifest as served_manifest
from tests.unit.agent.test_updater import activated, desired, manifest, phase, raw, restarted

SHADOW, HALF = Exposure(ExposureMode.SHADOW, 1.0), Exposure(ExposureMode.SPLIT, 0.5)


def wanted(revision: int, exposure: Exposure | None, **fields: Any) -> DesiredState:
    """`d2` beside `d1`."""
    one = DesiredDeployment("d2", raw(manifest("b")), exposure=exposure, **fields)
    return DesiredState(SPOKEN, "default", revision, (one,))


def exposed(exposure: Exposure = SHADOW, **fields: Any) -> Updater:
    """`d1` serves, and `d2` runs beside it."""
    updater = Updater({}, 0)
    updater.desired(desired(1, ("d1", "a")))
    activated(updater, "d1")
    updater.desired(wanted(2, exposure, **fields))
    updater.trusted("d2")
    updater.downloaded("d2")
    updater.verified("d2", good=True)
    assert updater.loaded("d2") == [ExposeArtifact("d2", "d1")]
    assert (phase(updater, "d1"), phase(updater, "d2")) == (Phase.ACTIVE, Phase.EXPOSED)
    return updater


# -- the updater


def test_it_runs_beside_until_the_server_lets_it_in() -> None:
    updater = exposed()
    assert updater.desired(wanted(3, SHADOW)) == []
    assert updater.desired(wanted(4, HALF)) == [ExposeArtifact("d2", "d1")]
    assert updater.may_serve("d2") == [], "nobody wants it to"
    assert updater.probation_over("d2", problem=None) == [], "time does not let it in"
    assert updater.desired(wanted(5, None)) == [LetServe("d2")]
    assert updater.may_serve("d2") == [ActivateArtifact("d2"), BeginProbation("d2", "d1")]
    assert phase(updater, "d2") is Phase.PROBATION
    assert updater.desired(wanted(6, SHADOW)) == [], "what serves in full is not taken back to a share"
    assert updater.probation_over("d2", problem=None) == [UnloadArtifact("m", "a" * 64)]
    assert phase(updater, "d1") is Phase.SUPERSEDED


def test_it_is_taken_away_when_it_is_wanted_no_more_and_what_serves_is_left_alone() -> None:
    updater = exposed()
    assert updater.desired(desired(3, ("d1", "a"))) == [StopDownload("d2"), UnloadArtifact("m", "b" * 64)]
    assert (phase(updater, "d1"), phase(updater, "d2")) == (Phase.ACTIVE, Phase.SUPERSEDED)


def test_what_speaks_against_it_takes_it_away_and_activates_nothing() -> None:
    updater = exposed()
    assert updater.probation_over("d2", problem="it fails") == [UnloadArtifact("m", "b" * 64)]
    assert phase(updater, "d2") is Phase.ROLLED_BACK
    failure = updater.records["d2"].failure
    assert failure is not None
    assert (failure.code, failure.detail) == (WireErrorCode.PROBATION_FAILED, "it fails")
    assert updater.desired(wanted(3, None)) == [], "it is not begun again under its id"


def test_a_worker_that_dies_takes_it_away() -> None:
    updater = exposed()
    assert updater.worker_crashed({}) == []
    assert phase(updater, "d2") is Phase.ROLLED_BACK
    assert updater.worker_ready() == [LoadArtifact("d1")]


def test_an_agent_that_ends_tries_it_again_however_often() -> None:
    updater = exposed()
    for _ in range(10):
        updater = restarted(updater)
        assert updater.recover() == [Download("d2")]
        assert updater.worker_ready() == [LoadArtifact("d1")]
        updater.loaded("d1")
        updater.downloaded("d2")
        updater.verified("d2", good=True)
        assert updater.loaded("d2") == [ExposeArtifact("d2", "d1")]
    assert phase(updater, "d2") is Phase.EXPOSED


def test_nothing_goes_first_to_make_room_for_what_is_to_run_beside_it() -> None:
    updater = Updater({}, 0)
    updater.desired(desired(1, ("d1", "a")))
    activated(updater, "d1")
    assert updater.desired(wanted(2, SHADOW, probation=ProbationPolicy(replace_when_short=True))) == [CheckTrust("d2")]
    updater.trusted("d2")
    updater.downloaded("d2")
    updater.verified("d2", good=True)
    assert updater.failed("d2", WireErrorCode.MEMORY_SHORT, "short") == [StopDownload("d2")]
    assert phase(updater, "d1") is Phase.ACTIVE


def test_beside_nothing_or_beside_itself_it_serves_in_full() -> None:
    updater = Updater({}, 0)
    updater.desired(wanted(1, SHADOW))
    updater.trusted("d2")
    updater.downloaded("d2")
    updater.verified("d2", good=True)
    assert updater.loaded("d2") == [ActivateArtifact("d2"), BeginProbation("d2", None)]
    same = Updater({}, 0)
    same.desired(desired(1, ("d1", "b")))
    activated(same, "d1")
    same.desired(wanted(2, SHADOW))
    same.trusted("d2")
    same.downloaded("d2")
    same.verified("d2", good=True)
    assert same.loaded("d2") == [ActivateArtifact("d2"), BeginProbation("d2", "d1")]


EVENTS = ["ready", "crash", "restart", "load", "fail", "bad", "shadow", "half", "full", "over", "gone"]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(EVENTS), max_size=25))
def test_whatever_happens_only_what_may_serve_in_full_is_activated(events: list[str]) -> None:
    """A model of the worker beside the updater: `d1` was active and nothing speaks against it."""
    updater = exposed()
    up, loading, loaded, serving, beside, revision = True, set[str](), {"d1", "d2"}, "d1", "d2", 2

    def carry_out(effects: list[Effect]) -> None:
        nonlocal serving, beside
        for effect in effects:
            match effect:
                case LoadArtifact():
                    loading.add(effect.deployment_id)
                case ActivateArtifact():
                    assert effect.deployment_id in loaded
                    assert effect.deployment_id == "d1" or updater.records["d2"].exposure is None or serving != "d1"
                    serving = effect.deployment_id
                    beside = "" if beside == serving else beside
                case ExposeArtifact():
                    assert {effect.deployment_id, effect.before_id} == {"d1", "d2"}
                    assert {"d1", "d2"} <= loaded
                    assert serving == "d1"
                    beside = effect.deployment_id
                case UnloadArtifact():
                    gone = "d1" if effect.digest[0] == "a" else "d2"
                    loaded.discard(gone)
                    serving = "" if serving == gone else serving
                    beside = "" if beside == gone else beside
                case Download():
                    updater.downloaded(effect.deployment_id)
                    carry_out(updater.verified(effect.deployment_id, good=True))
                case LetServe():
                    carry_out(updater.may_serve(effect.deployment_id))
                case _:
                    pass

    for event in events:
        if event == "ready" and not up:
            up = True
            carry_out(updater.worker_ready())
        elif event in {"crash", "restart"}:
            up, serving, beside = False, "", ""
            loading.clear()
            loaded.clear()
            if event == "crash":
                carry_out(updater.worker_crashed({}))
            else:
                updater = restarted(updater)
                up = True
                carry_out([*updater.recover(), *updater.worker_ready()])
        elif event in {"load", "fail"} and up and loading:
            key = min(loading)
            loading.discard(key)
            if event == "load" or phase(updater, key) is Phase.ACTIVE:
                loaded.add(key)
                carry_out(updater.loaded(key))
            else:
                carry_out(updater.failed(key, WireErrorCode.GOLDEN_MISMATCH, "it does not do"))
        elif event in {"bad", "over"}:
            carry_out(updater.probation_over("d2", problem="bad" if event == "bad" else None))
        elif event in {"shadow", "half", "full"}:
            revision += 1
            carry_out(updater.desired(wanted(revision, {"shadow": SHADOW, "half": HALF, "full": None}[event])))
        elif event == "gone" and phase(updater, "d1") is Phase.ACTIVE:
            revision += 1
            carry_out(updater.desired(desired(revision, ("d1", "a"))))
        if up:
            assert serving or loading, "nothing answers, and nothing will"
            now = phase(updater, "d2")
            assert (beside == "d2") == (now is Phase.EXPOSED)
            if now is Phase.EXPOSED:
                assert serving == "d1"


# -- the watching


def test_it_is_judged_by_what_it_does_since_it_serves_in_full() -> None:
    probation = Probation()
    forever = ProbationPolicy(seconds=1e9)
    probation.begin("d2", forever, 0.0, before_id="d1", before_mb=100.0)
    fast = {bucket_of(0.001): 1000}
    probation.counted(Peeked(1, (Counts("d2", 1000, 0, 0, fast),), 100.0), 1.0)
    assert probation.tick(1.0) == []
    probation.begin("d2", ProbationPolicy(seconds=10.0), 2.0, before_id="d1", before_mb=100.0)
    slow = fast | {bucket_of(0.5): 6}
    probation.counted(Peeked(2, (Counts("d2", 1006, 6, 0, slow),), 100.0), 3.0)
    (over,) = probation.tick(3.0)
    assert over.problem == "6 of 6 requests failed while the version was watched"
    assert over.report.latency_p95_ms == pytest.approx(500, rel=0.03)


# -- which requests


class Held(Doubling):
    """Answers when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.began = threading.Event()

    def run(self, inputs: Tensors) -> Tensors:
        self.began.set()
        return super().run(inputs)


@pytest.fixture
def held() -> Iterator[tuple[LoadedModel, Held]]:
    runtime = Held()
    model = LoadedModel(served_manifest(-1, 8), "d2", runtime)
    yield model, runtime
    runtime.free.set()
    model.close()


def asked(model: LoadedModel, share: float, ids: list[str]) -> list[bool]:
    beside = Beside(model, Exposure(ExposureMode.SPLIT, share))
    return [beside.answers(one) for one in ids]


def test_requests_are_picked_by_their_id_or_by_turns(held: tuple[LoadedModel, Held]) -> None:
    model, _ = held
    ids = [f"request {number}" for number in range(4000)]
    few, many = asked(model, 0.1, ids), asked(model, 0.4, ids)
    assert abs(sum(few) - 400) < 80
    assert abs(sum(many) - 1600) < 130
    assert all(after for before, after in zip(few, many, strict=True) if before), (
        "a larger share has those of a smaller"
    )
    assert sum(asked(model, 0.25, [""] * 100)) == 25
    assert asked(model, 0.25, [""] * 8) == [False, False, False, True] * 2
    for share, expected in ((0.0, False), (1.0, True)):
        assert set(asked(model, share, ids + [""] * 10)) == {expected}
    other = LoadedModel(msgspec.structs.replace(model.manifest, digest="1" * 64), "d3", Doubling())
    assert asked(other, 0.4, ids) != many, "another version is tried with others"
    other.close()


def test_what_does_not_fit_is_dropped_and_counted_and_nobody_waits(held: tuple[LoadedModel, Held]) -> None:
    model, runtime = held
    runtime.free.clear()
    beside = Beside(model, SHADOW)
    row = np.ones((1, 2), np.float32)
    beside.served({"x": row}, {"y": row * 2}, 1, "")
    assert runtime.began.wait(10)
    for _ in range(WAITING + 5):
        beside.served({"x": row}, {"y": row * 2}, 1, "")
    assert model.recorder.collect().dropped == 5
    runtime.free.set()
    wait_until("the copies", lambda: model.recorder._counts.compared == WAITING + 1)
    runtime.began.clear()
    runtime.free.clear()
    large = np.zeros((1, 2 + WAITING_BYTES // 8), np.float32)
    beside.served({"x": row}, {"y": row}, 1, "")
    assert runtime.began.wait(10)
    for _ in range(3):
        beside.served({"x": large}, {"y": row}, 1, "")
    assert model.recorder._counts.dropped == 2, "their bytes are bounded too"
    beside.end()
    runtime.free.set()
    wait_until("the end", lambda: model.recorder._counts.dropped == 3)
    window = model.recorder.collect()
    assert (window.shadowed, window.requests) == (WAITING + 2, WAITING + 2)


def test_a_version_that_was_taken_out_answers_no_copy_and_counts_no_error(held: tuple[LoadedModel, Held]) -> None:
    model, runtime = held
    model.close()
    assert model.shadow({"x": np.ones((1, 2), np.float32)}, 1, "") is None
    assert runtime.rows == []
    assert model.recorder.collect().errors == 0


def test_the_registry_keeps_nothing_beside_that_is_gone_or_serves() -> None:
    registry = Registry()
    models = []
    for digest in "ab":
        manifest_of = msgspec.structs.replace(served_manifest(-1, 8), digest=digest * 64)
        models.append(LoadedModel(manifest_of, digest, Doubling()))
        registry.add(models[-1])
    assert not registry.expose("m", "b" * 64, SHADOW), "nothing serves"
    registry.activate("m", "a" * 64)
    assert not registry.expose("m", "a" * 64, SHADOW), "it serves itself"
    assert not registry.expose("m", "c" * 64, SHADOW), "it is not loaded"
    assert registry.expose("m", "b" * 64, SHADOW)
    found = registry.beside("m")
    assert found is not None
    assert found.model is models[1]
    registry.activate("m", "b" * 64)
    assert registry.beside("m") is None
    assert registry.expose("m", "a" * 64, HALF)
    registry.remove("m", "a" * 64)
    assert registry.beside("m") is None
    for model in models:
        model.close()


# -- how answers compare


def test_of_scores_the_class_counts_and_of_numbers_the_distance() -> None:
    scores = np.array([[1, 2, 3], [3, 1, 2], [0, 0, 1]], np.float32)
    others = np.array([[0, 0, 9], [1, 3, 2], [0, 0, 1]], np.float32)
    assert disagreements({"s": scores}, {"s": others}, 3, {}) == 1
    prices, near, far = (np.array([100.0, one, -5.0], np.float32) for one in (10.0, 10.09, 10.2))
    assert disagreements({"p": prices}, {"p": near}, 3, {}) == 0
    assert disagreements({"p": prices}, {"p": far}, 3, {}) == 1
    assert disagreements({"p": prices}, {"p": far}, 3, {"p": 0.25}) == 0
    assert disagreements({"p": prices}, {"p": near}, 3, {"p": 0.05}) == 1
    assert disagreements({"s": scores, "p": prices}, {"s": others, "p": far}, 3, {}) == 1, "a row counts once"
    labels = np.array([1, 2, 3])
    assert disagreements({"l": labels}, {"l": np.array([1, 2, 4])}, 3, {}) == 1
    words = np.array(["a", "b", "c"], object)
    assert disagreements({"w": words}, {"w": np.array(["a", "x", "y"], object)}, 3, {}) == 2


def test_other_names_and_shapes_and_numbers_that_are_none_disagree() -> None:
    row = np.array([[1.0], [np.nan], [np.inf]], np.float32)
    assert disagreements({"y": row}, {"z": row}, 3, {}) == 3
    assert disagreements({"y": row}, {"y": row[:2]}, 3, {}) == 3
    assert disagreements({"y": row}, {"y": row.copy()}, 3, {}) == 0
    assert disagreements({"y": row}, {"y": np.array([[1.0], [1.0], [-np.inf]], np.float32)}, 3, {}) == 2
    assert disagreements({"y": np.float32(2.0).reshape(())}, {"y": np.float32(3.0).reshape(())}, 3, {}) == 3
    assert disagreements({"y": np.zeros((3, 0))}, {"y": np.zeros((3, 0))}, 3, {}) == 0


def test_what_golden_inputs_allow_is_in_units_of_the_output() -> None:
    rows = ({"x": np.zeros((1, 1))}, {"x": np.ones((1, 1))})
    answers = tuple(
        {"y": golden.Answer((1,), np.array([value])), "n": golden.Answer((1,), np.array([1]))} for value in (0.0, 10.0)
    )
    known = golden.Golden(rows, answers, {"y": 0.1, "n": 0.25})
    assert golden.differences(known) == {"y": 0.1 * 5.0}
    assert golden.differences(golden.Golden(rows, answers, {"y": golden.UNCOMPARED})) == {}


# -- the wire


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), float("inf")])
def test_an_impossible_share_is_refused(share: float) -> None:
    payload = encode(wanted(1, Exposure(ExposureMode.SPLIT, 0.5)))
    text = payload.decode().replace('"share":0.5', f'"share":{"1e999" if share != share else share}')
    with pytest.raises(WireError):
        decode(text.encode(), DesiredState)


def test_an_exposure_travels_and_none_is_the_default() -> None:
    assert decode(encode(wanted(1, HALF)), DesiredState).deployments[0].exposure == HALF
    assert decode(encode(desired(1, ("d1", "a"))), DesiredState).deployments[0].exposure is None
