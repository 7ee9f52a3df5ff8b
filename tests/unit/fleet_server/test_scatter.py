"""Where a variant's candidates stand in the picture of quality against latency."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_server.web.plots import LETTER, LINE, scatter


def candidate(recipe: str, latency: float, accuracy: float) -> dict[str, Any]:
    return {"recipe": recipe, "measurements": {"latency_p50_ms": latency, "accuracy": accuracy}}


def test_points_stand_by_their_figures_and_lines_at_round_numbers() -> None:
    picture = scatter([candidate("fp32", 0.00706, 1.0), candidate("int8", 0.0164, 0.875)])
    assert picture is not None
    assert picture["quality"] == "accuracy"
    assert [value for _, value in picture["across"]] == pytest.approx([0.0, 0.005, 0.01, 0.015, 0.02])
    assert [value for _, value in picture["up"]] == pytest.approx([0.875, 0.9, 0.925, 0.95, 0.975, 1.0])
    fast, slow = picture["points"]
    assert fast["y"] == picture["up"][-1][0]
    assert slow["y"] == picture["up"][0][0]
    assert (fast["x"] - picture["left"]) / (slow["x"] - picture["left"]) == pytest.approx(0.00706 / 0.0164)
    assert all(point["label"] for point in picture["points"])


def test_there_is_no_picture_of_one() -> None:
    assert scatter([candidate("fp32", 1.0, 1.0), {"recipe": "int8", "measurements": None}]) is None


FIGURES = st.tuples(st.floats(0.0, 1e4), st.floats(0.0, 1.0))


@given(st.lists(FIGURES, min_size=2, max_size=25))
def test_no_name_covers_another_or_leaves_the_picture(figures: list[tuple[float, float]]) -> None:
    picture = scatter([candidate(f"onnx-static-u8-{n}", *pair) for n, pair in enumerate(figures)])
    assert picture is not None
    for point in picture["points"]:
        assert picture["left"] <= point["x"] <= picture["right"]
        assert picture["top"] <= point["y"] <= picture["bottom"]
    assert len(picture["up"]) <= 7
    assert len(picture["across"]) <= 7
    named = [(point["label"], len(point["one"]["recipe"])) for point in picture["points"] if point["label"]]
    assert named, "the first has all the room there is"
    boxes = [(at["x"], at["y"] - 4, at["x"] + LETTER * size) for at, size in named]
    for number, (left, middle, right) in enumerate(boxes):
        assert left >= 0
        assert right <= picture["width"]
        for other_left, other_middle, other_right in boxes[:number]:
            assert right <= other_left or other_right <= left or abs(middle - other_middle) >= LINE - 1e-6
