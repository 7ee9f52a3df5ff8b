"""From outputs to answers: the best classes, and objects with non-maximum suppression, by hand and by property."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from agent.processing.classify import classify
from agent.processing.detect import AnswerError, detect, suppress
from agent.processing.image import Geometry
from agent.protocol.processing import Activation, BoxFormat, Classification, Columns, Coordinates, Detection
from agent.trial.scoring import answers

SAME = Geometry(100, 100, (1.0, 1.0), (0.0, 0.0))
PARTS = {"boxes": Columns("boxes"), "scores": Columns("scores")}


def test_the_best_classes_by_hand() -> None:
    scores, classes = classify(np.array([[1.0, 3.0, 2.0]]), Classification(activation=Activation.SOFTMAX, top_k=2))
    assert classes.tolist() == [1, 2]
    assert scores == pytest.approx([0.66524, 0.24473], abs=1e-5)
    scores, classes = classify(np.array([0.0, 9.0]), Classification(activation=Activation.SIGMOID, threshold=0.6))
    assert classes.tolist() == [1]
    assert scores == pytest.approx([0.99988], abs=1e-5)
    assert classify(np.array([np.nan, 1.0, np.nan]), Classification(top_k=3))[1].tolist() == [1]
    far = classify(np.array([-1e30, 1e30], np.float32), Classification(activation=Activation.SOFTMAX))
    assert far[0].tolist() == [1.0, 0.0]


@given(arrays(np.float32, st.integers(2, 20), elements=st.sampled_from([0.0, 1.0, 50.0, 50.000004, 200.0])))
def test_the_best_class_is_the_one_accuracy_goes_by(row: Any) -> None:
    for activation in Activation:
        assert classify(row, Classification(activation=activation, top_k=1))[1].tolist() == answers(row[None]).tolist()


def found(boxes: Any, scores: Any, **fields: Any) -> Any:
    answer = Detection(**{**PARTS, **fields})
    outputs = {"boxes": np.array(boxes, np.float32)[None], "scores": np.array(scores, np.float32)[None]}
    return detect(outputs, answer, (100, 100), SAME)


TWO = [[0, 0, 10, 10], [0, 0, 10, 8], [50, 50, 60, 60]]


def test_suppression_by_hand() -> None:
    """The second lies 80 % in the first."""
    scores = [[0.9, 0.0], [0.8, 0.0], [0.0, 0.7]]
    got = found(TWO, scores)
    assert got.boxes.tolist() == [TWO[0], TWO[2]]
    assert got.scores == pytest.approx([0.9, 0.7])
    assert got.classes.tolist() == [0, 1]
    assert len(found(TWO, scores, overlap=0.81).scores) == 3
    assert len(found(TWO, scores, overlap=0.8).scores) == 2
    assert len(found(TWO, scores, overlap=None).scores) == 3
    assert len(found(TWO, scores, threshold=0.75).scores) == 1
    assert found(TWO, scores, overlap=None, max_boxes=1).scores == pytest.approx([0.9])


def test_classes_suppress_each_other_only_when_asked() -> None:
    scores = [[0.9, 0.0], [0.0, 0.8], [0.0, 0.7]]
    assert found(TWO, scores).classes.tolist() == [0, 1, 1]
    assert found(TWO, scores, across_classes=True).classes.tolist() == [0, 1]
    assert found(TWO, scores, background=0).scores == pytest.approx([0.8, 0.7])


@pytest.mark.parametrize(
    ("kind", "box"),
    [
        (BoxFormat.XYXY, [10, 20, 30, 60]),
        (BoxFormat.YXYX, [20, 10, 60, 30]),
        (BoxFormat.XYWH, [10, 20, 20, 40]),
        (BoxFormat.CXCYWH, [20, 40, 20, 40]),
    ],
)
def test_formats_and_coordinates_mean_the_same_box(kind: BoxFormat, box: Any) -> None:
    assert found([box], [[1.0]], format=kind).boxes.tolist() == [[10, 20, 30, 60]]
    shares = np.array(box) / 100
    near = found([shares], [[1.0]], format=kind, coordinates=Coordinates.RELATIVE).boxes
    assert near[0] == pytest.approx([10, 20, 30, 60], abs=1e-4)


def test_one_tensor_of_boxes_objectness_and_classes_in_columns() -> None:
    rows = np.array([[50, 50, 20, 20, 0.5, 0.1, 0.9], [10, 10, 4, 4, 0.1, 0.9, 0.1]], np.float32)
    answer = Detection(
        boxes=Columns("out", (0, 4), transposed=True),
        objectness=Columns("out", (4, 5), transposed=True),
        scores=Columns("out", (5, 7), transposed=True),
        format=BoxFormat.CXCYWH,
    )
    # Letterboxed: the image is 200 × 100, at half its size and 25 pixels down.
    got = detect({"out": rows.T[None]}, answer, (100, 100), Geometry(200, 100, (0.5, 0.5), (0.0, 25.0)))
    assert got.boxes.tolist() == [[80, 30, 120, 70]]
    assert got.scores == pytest.approx([0.45])
    assert got.classes.tolist() == [1]


def test_scores_and_classes_in_outputs_of_their_own() -> None:
    answer = Detection(**PARTS, classes=Columns("classes"), overlap=None, background=0)
    outputs = {
        "boxes": np.array([TWO], np.float32),
        "scores": np.array([[0.9, 0.8, 0.7]], np.float32),
        "classes": np.array([[7.0, 0.0, np.nan]], np.float32),
    }
    got = detect(outputs, answer, (100, 100), SAME)
    assert got.classes.tolist() == [7]
    flat = {name: value[0] for name, value in outputs.items()}
    assert detect(flat, answer, (100, 100), SAME).classes.tolist() == [7]


def test_what_is_no_number_and_what_lies_outside_is_no_object() -> None:
    boxes = [[0, 0, np.nan, 5], [0, 0, np.inf, 5], [-9, -9, -1, -1], [200, 0, 210, 5], [5, 5, 5, 9], [5, 5, 4, 4]]
    assert len(found(boxes, [[0.9]] * 6).scores) == 0
    assert len(found([TWO[0]], [[np.nan]]).scores) == 0
    assert found(np.zeros((0, 4)), np.zeros((0, 3))).boxes.shape == (0, 4)


@pytest.mark.parametrize(
    ("boxes", "scores"), [(np.zeros((1, 3, 5)), np.zeros((1, 3, 2))), (np.zeros((1, 3, 4)), np.zeros((1, 2, 2))),
                          (np.zeros((1, 3, 4)), np.zeros((1, 3, 0))), (np.zeros((1, 3, 4, 1)), np.zeros((1, 3, 1)))]
)  # fmt: skip
def test_outputs_of_other_shapes_are_an_error_with_their_shape(boxes: Any, scores: Any) -> None:
    with pytest.raises(AnswerError):
        detect({"boxes": boxes, "scores": scores}, Detection(**PARTS), (100, 100), SAME)


BOXES = arrays(np.float64, (12, 4), elements=st.floats(-20, 120, width=32))


@settings(max_examples=200, deadline=None)
@given(BOXES, arrays(np.int64, 12, elements=st.integers(0, 2)), st.floats(0.05, 1.0))
def test_the_best_box_stays_and_none_that_stay_overlap(corners: Any, groups: Any, overlap: float) -> None:
    kept = suppress(corners, groups, overlap, 100)
    assert kept[0] == 0
    assert sorted(kept) == list(kept)

    def share(one: Any, other: Any) -> float:
        low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
        shared = float(np.prod(np.maximum(high - low, 0)))
        areas = [float(np.prod(np.maximum(box[2:] - box[:2], 0))) for box in (one, other)]
        return shared / (sum(areas) - shared) if sum(areas) > shared else 0.0

    for place in range(len(corners)):
        better = [index for index in kept if index < place and groups[index] == groups[place]]
        near = [share(corners[index], corners[place]) for index in better]
        if place in kept:
            assert all(one < overlap + 1e-9 for one in near)
        else:
            assert max(near) >= overlap - 1e-9


@settings(max_examples=100, deadline=None)
@given(BOXES, arrays(np.float32, (12, 3), elements=st.floats(0, 1, width=32)))
def test_boxes_stay_in_the_image_and_scores_fall(corners: Any, scores: Any) -> None:
    outputs = {"boxes": corners[None].astype(np.float32), "scores": scores[None]}
    got = detect(outputs, Detection(**PARTS, threshold=0.0), (100, 100), Geometry(33, 57, (1.7, 1.7), (3.0, -9.0)))
    assert (got.boxes >= 0).all()
    assert (got.boxes <= [33, 57, 33, 57]).all()
    assert (np.diff(got.scores) <= 0).all()
