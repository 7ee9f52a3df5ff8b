"""Where bars of histograms are drawn."""

from __future__ import annotations

from typing import Any

import pytest

from fleet_server.web.bars import BOTTOM, LABELS, LEFT, RIGHT, TOP, bars


def one(label: str, reference: float | None, now: float | None, low: float | None = None) -> dict[str, Any]:
    return {"label": label, "low": low, "high": None if low is None else low + 1, "reference": reference, "now": now}


def test_bars_stand_beside_each_other_and_the_highest_fills_the_picture() -> None:
    picture = bars({"bins": [one("cat", 0.5, None), one("a dog in the rain", 0.25, 1.0)]})
    assert [bar["height"] for bar in picture["reference"]] == [
        pytest.approx((BOTTOM - TOP) * share) for share in (0.5, 0.25)
    ]
    assert [bar["height"] for bar in picture["now"]] == [0, pytest.approx(BOTTOM - TOP)]
    assert [bar["y"] + bar["height"] for bar in picture["now"]] == [BOTTOM, pytest.approx(BOTTOM)]
    (old, new), (_, last) = zip(picture["reference"], picture["now"], strict=True)
    assert old["x"] + old["width"] == pytest.approx(new["x"])
    assert old["x"] > LEFT
    assert last["x"] + last["width"] < RIGHT
    assert [label["text"] for label in picture["labels"]] == ["cat", "a dog in …"]
    assert picture["up"] == [(BOTTOM, 0.0), (pytest.approx(88), 0.5), (TOP, 1.0)]


def test_numbers_are_named_at_their_edges_and_not_too_often() -> None:
    picture = bars({"bins": [one("", 0.1, 0.1, low) for low in range(20)]})
    assert len(picture["labels"]) <= LABELS
    assert picture["labels"][0] == {"x": LEFT, "text": "0"}
    assert picture["labels"][1]["text"] == "4"


def test_of_nothing_there_is_nothing() -> None:
    picture = bars({"bins": [one("", 0.0, None)]})
    assert picture["reference"][0]["height"] == 0
    assert bars({"bins": []})["labels"] == []
