"""What is sketched of rows is what numpy says of them, within its bounds; it adds up, and it fails no request."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.protocol import sketch
from agent.protocol.codec import decode, encode
from agent.protocol.histogram import ALPHA, merge
from agent.protocol.limits import LIMITS
from agent.protocol.manifest import Manifest, TensorSpec
from agent.protocol.messages import ModelWindow, TelemetryBatch, TensorSketch
from agent.protocol.version import SPOKEN
from agent.runtimes.base import Tensors
from agent.serving.models import LoadedModel
from agent.telemetry.batch import fitting
from agent.telemetry.recorder import Recorder
from agent.telemetry.sketches import NUMBERS, ROWS_A_SECOND, TOGETHER, Sketches, Stride, buckets_of, top_confidence
from tests.unit.agent.test_serving_models import Doubling, manifest

NUMBERS_OF_ANY_SIZE = st.floats(allow_nan=True, allow_infinity=True)


def net(inputs: tuple[TensorSpec, ...], *outputs: TensorSpec) -> Manifest:
    return msgspec.structs.replace(manifest(-1, 8), inputs=inputs, outputs=outputs)


PICTURE = TensorSpec("x", "float32", (-1, 3, 8, 8))
SCORES = TensorSpec("scores", "float32", (-1, 3))
CLASSIFIER = net((PICTURE,), SCORES)


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


@given(st.lists(NUMBERS_OF_ANY_SIZE, min_size=1, max_size=50))
def test_many_numbers_have_the_buckets_that_each_has_alone(numbers: list[float]) -> None:
    with np.errstate(all="ignore"):
        found = buckets_of(np.array(numbers)).tolist()
    for number, bucket in zip(numbers, found, strict=True):
        other = sketch.bucket_of(number)  # of a number at an edge, the last bit of its logarithm decides
        assert bucket == other or sketch.bucket_of(number * (1 + 1e-12)) != sketch.bucket_of(number * (1 - 1e-12))
        assert abs(bucket - other) <= 1


@given(st.floats(sketch.SMALLEST * 1.001, 1e11), st.booleans())
def test_a_bucket_stands_for_its_numbers_within_two_percent(size: float, negative: bool) -> None:
    number = -size if negative else size
    assert sketch.bucket_value(sketch.bucket_of(number)) == pytest.approx(number, rel=ALPHA * 1.0001)


def test_the_ends_of_the_buckets() -> None:
    assert [sketch.bucket_of(one) for one in (0.0, -0.0, 1e-6, 1e300, -1e300)] == [0, 0, 0, sketch.LARGEST, -1024]
    assert [sketch.bucket_of(one) for one in (math.nan, math.inf, -math.inf)] == [sketch.NOT_FINITE] * 3
    assert sketch.bucket_value(0) == 0
    assert math.isnan(sketch.bucket_value(sketch.NOT_FINITE))
    assert [sketch.confidence_bin(one) for one in (0.0, 0.5, 1.0)] == [0, 16, 31]


@given(st.dictionaries(st.integers(-1024, 1025), st.integers(1, 9), max_size=80), st.integers(3, 40))
def test_a_histogram_is_bounded_by_what_is_nearest_to_zero(buckets: dict[int, int], cells: int) -> None:
    found = sketch.bounded(buckets, cells)
    assert len(found) <= max(cells, 0)
    assert sum(found.values()) == sum(buckets.values())
    largest = sorted(buckets, key=abs)[-(cells - 2) :]
    nearest = min(map(abs, largest), default=0)
    assert all(found[one] == buckets[one] for one in largest if abs(one) > nearest)


def test_of_too_many_classes_the_most_common_are_told() -> None:
    classes = {number: number + 1 for number in range(20)}
    found = sketch.most_common(classes, 5)
    assert found == {19: 20, 18: 19, 17: 18, 16: 17, sketch.OTHERS: sum(range(1, 17))}
    again = sketch.most_common(found | {40: 100}, 5)
    assert again == {40: 100, 19: 20, 18: 19, 17: 18, sketch.OTHERS: sum(range(1, 17)) + 17}


def test_confidence_is_the_largest_probability_or_the_largest_of_the_softmax() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 3, (200, 5))
    probabilities = softmax(rng.normal(0, 3, (200, 5)))
    both = np.concatenate([scores, probabilities])
    expected = np.concatenate([softmax(scores).max(axis=1), probabilities.max(axis=1)])
    np.testing.assert_allclose(top_confidence(both.astype(np.float32)), expected, rtol=1e-5)
    nearly = np.array([[0.6, 0.4005], [0.6, 0.403], [1.2, -0.2]])
    np.testing.assert_allclose(top_confidence(nearly), [0.6, *softmax(nearly)[1:].max(axis=1)], rtol=1e-12)


def test_sketches_are_those_of_numpy() -> None:
    rng = np.random.default_rng(1)
    rows = min(ROWS_A_SECOND, 24)
    pictures = rng.normal(5, 2, (rows, 3, 8, 8)).astype(np.float32)
    scores = rng.normal(0, 2, (rows, 3)).astype(np.float32)
    sketches = Sketches(CLASSIFIER)
    for row in range(rows):
        sketches.observe({"x": pictures[row : row + 1]}, {"scores": scores[row : row + 1]}, 1, row / 100)
    found = sketches.collect()
    flat = pictures.reshape(rows, -1).astype(np.float64)
    assert found.inputs == {
        "x": TensorSketch(
            dict(Counter(map(sketch.bucket_of, flat.mean(axis=1)))),
            dict(Counter(map(sketch.bucket_of, flat.std(axis=1)))),
        )
    }
    confidences = softmax(scores.astype(np.float64)).max(axis=1)
    assert found.confidence == dict(Counter(map(sketch.confidence_bin, confidences)))
    assert found.predicted == dict(Counter(scores.argmax(axis=1).tolist()))
    assert found.outputs == {}
    empty = sketches.collect()
    assert (empty.confidence, empty.predicted, empty.inputs) == ({}, {}, {}), "a new window begins"


def test_one_number_a_row_is_sketched_of_inputs_and_outputs() -> None:
    columns = (
        TensorSpec("age", "int64", (-1, 1)),
        TensorSpec("name", "object", (-1, 1)),
        TensorSpec("ids", "int32", (-1, 4)),
    )
    sketches = Sketches(net(columns, TensorSpec("price", "float32", (-1,)), TensorSpec("label", "int64", (-1,))))
    inputs: Tensors = {
        "age": np.array([[30], [40]]),
        "name": np.array([["a"], ["b"]], object),
        "ids": np.array([[1, 1, 1, 1], [0, 0, 0, 0]], np.int32),
    }
    outputs: Tensors = {"price": np.array([-10.0, np.nan], np.float32), "label": np.array([1, 2])}
    sketches.observe(inputs, outputs, 2, 0.0)
    found = sketches.collect()
    thirty, forty, one = (sketch.bucket_of(value) for value in (30.0, 40.0, 1.0))
    assert found.inputs == {
        "age": TensorSketch({thirty: 1, forty: 1}),
        "ids": TensorSketch({one: 1, 0: 1}, {0: 2}),
    }
    assert found.outputs == {"price": TensorSketch({sketch.bucket_of(-10.0): 1, sketch.NOT_FINITE: 1})}
    assert (found.confidence, found.predicted) == ({}, {})


def test_rows_whose_scores_are_no_numbers_are_counted_as_such() -> None:
    sketches = Sketches(CLASSIFIER)
    scores = np.array([[np.nan, 1, 2], [0, np.inf, 0], [0, 0, 9]], np.float32)
    sketches.observe({"x": np.zeros((3, 3, 8, 8), np.float32)}, {"scores": scores}, 3, 0.0)
    found = sketches.collect()
    assert found.confidence == {sketch.NO_NUMBER: 2, 31: 1}
    assert found.predicted == {2: 1}


def test_of_a_long_row_numbers_of_every_channel_are_looked_at() -> None:
    """At a distance that is a multiple of the channels it would be one of them alone."""
    picture = np.zeros((1, 64, 192, 3), np.float32)
    picture[..., 1] = 3.0
    assert picture.size / NUMBERS == 9, "every ninth number is of the first channel"
    sketches = Sketches(net((TensorSpec("x", "float32", (-1, 64, 192, 3)),), SCORES))
    sketches.observe({"x": picture}, {"scores": np.zeros((1, 3), np.float32)}, 1, 0.0)
    (bucket,) = sketches.collect().inputs["x"].mean
    assert sketch.bucket_value(bucket) == pytest.approx(1.0, rel=0.03)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 200), st.floats(0, 0.3)), min_size=1, max_size=100))
def test_never_more_rows_than_allowed_are_taken_in_a_second(arrivals: list[tuple[int, float]]) -> None:
    stride, again, now = Stride(), Stride(), 0.0
    begun, taken = -math.inf, 0
    for rows, pause in arrivals:
        now += pause
        picked = stride.take(rows, now)
        assert picked == again.take(rows, now), "it is no matter of chance"
        if now - begun >= 1.0:
            begun, taken = now, 0
        count = len(range(rows)[picked])
        assert count == len(range(picked.start, picked.stop, picked.step)), "none is beyond what came"
        taken += count
        assert taken <= ROWS_A_SECOND


def test_of_a_steady_stream_each_nth_row_is_taken() -> None:
    stride = Stride(rows_a_second=10)
    numbers = [n for n in range(3000) if len(range(1)[stride.take(1, n / 100)])]
    steps = {after - before for before, after in pairwise(numbers[20:])}
    assert steps == {10}
    assert len(numbers) == pytest.approx(300, abs=15)


def test_windows_add_up_to_what_one_window_would_have_been() -> None:
    rng = np.random.default_rng(2)
    pictures = rng.normal(0, 1, (20, 3, 8, 8)).astype(np.float32)
    scores = rng.normal(0, 1, (20, 3)).astype(np.float32)
    whole, parts = Sketches(CLASSIFIER), Sketches(CLASSIFIER)
    whole.observe({"x": pictures}, {"scores": scores}, 20, 0.0)
    sums: list[dict[int, int]] = [{}, {}, {}, {}]
    for half in (slice(0, 10), slice(10, 20)):
        parts.observe({"x": pictures[half]}, {"scores": scores[half]}, 10, 0.0)
        found = parts.collect()
        for total, other in zip(
            sums, (found.confidence, found.predicted, found.inputs["x"].mean, found.inputs["x"].deviation), strict=True
        ):
            merge(total, other)
    one = whole.collect()
    assert sums == [one.confidence, one.predicted, one.inputs["x"].mean, one.inputs["x"].deviation]


def test_what_can_not_be_sketched_fails_no_request(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(Doubling):
        def run(self, inputs: Tensors) -> Tensors:
            return {"y": np.zeros((), np.float32)} if inputs["x"][0, 0] > 1 else {"y": inputs["x"].astype("V4")}

    model = LoadedModel(
        msgspec.structs.replace(manifest(-1, 8), inputs=(PICTURE, TensorSpec("lost", "float32", (-1,)))), "d", Odd()
    )
    for value in (0.0, 2.0):
        answer = asyncio.run(model.infer({"x": np.full((1, 2), value, np.float32)}, ""))
        assert "y" in answer
    window = model.recorder.collect()
    assert (window.requests, window.errors, window.inputs) == (2, 0, {})
    assert caplog.text.count("nothing more is sketched") == 1
    model.close()


def test_served_rows_come_into_the_window_batched_or_not() -> None:
    runtime = Doubling()
    model = LoadedModel(manifest(-1, 8), "d", runtime)

    async def many() -> None:
        runtime.free.clear()
        asked = [asyncio.create_task(model.infer({"x": np.array([[0.0, float(i)]], np.float32)}, "")) for i in range(6)]
        await asyncio.sleep(0.05)
        runtime.free.set()
        await asyncio.gather(*asked)

    asyncio.run(many())
    model.close()
    window = model.recorder.collect()
    assert len(runtime.rows) < 6
    assert window.predicted == {0: 1, 1: 5}
    assert sum(window.confidence.values()) == sum(window.inputs["x"].mean.values()) == 6


def test_what_waits_to_be_counted_is_bounded() -> None:
    recorder = Recorder(CLASSIFIER, "d", "cpu")
    sketches = recorder._sketches
    for number in range(500):
        recorder.observed(
            {"x": np.ones((4, 3, 8, 8), np.float32)},
            {"scores": np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]},
            4,
            number * 0.01,
        )
        assert sketches._rows < TOGETHER
    assert sum(recorder.collect().confidence.values()) <= 6 * ROWS_A_SECOND


def test_a_batch_that_is_too_large_loses_sketches_and_no_count() -> None:
    wide = TensorSketch(dict.fromkeys(range(256), 1 << 40), dict.fromkeys(range(256), 1 << 40))
    sketches = {f"input {number}": wide for number in range(16)}
    large = ModelWindow(
        "m", "1", "a" * 64, "d", "cpu", 5, inputs=sketches, outputs=sketches, confidence={3: 5}, crashes=1
    )
    windows = fitting(
        [large] * 60
        + [ModelWindow("idle", "1", "a" * 64, "d", "cpu")]
        + [msgspec.structs.replace(large, requests=1)] * 9
    )
    assert len(windows) == LIMITS.models_per_batch
    payload = encode(TelemetryBatch(SPOKEN, "spool", 1, 0.0, 1.0, windows))
    assert decode(payload, TelemetryBatch).models == windows
    assert all(one.confidence == {3: 5} and one.crashes == 1 for one in windows)
    assert 0 < sum(bool(one.inputs) for one in windows) < len(windows) / 2
