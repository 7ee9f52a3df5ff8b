"""Which layers hurt when they are quantized, and what is done about nets that are too slow to try them all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from agent.trial.dataset import Dataset
from converters.step import Context, Parameter
from converters.steps import onnx_sensitivity
from converters.steps.onnx_sensitivity import LEAST_ROWS, agreement_of, answers_of, ordered_by_harm, relative_error
from tests.fleet import write_classifier

GROUPS = [["a"], ["b"], ["c"]]


def test_the_most_harmful_come_first() -> None:
    """A group's harm is what is lost when all others stay in floating point."""
    left: dict[str, float] = {"a": 0.1, "b": 0.7, "c": 0.2}
    found: dict[str, Parameter] = {}
    ordered = ordered_by_harm(GROUPS, lambda others: left[({"a", "b", "c"} - set(others)).pop()], found)
    assert ordered == [["b"], ["c"], ["a"]]
    assert found == {}


def test_what_is_not_tried_in_time_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_sensitivity, "TRYING_SECONDS", -1.0)
    found: dict[str, Parameter] = {}
    ordered = ordered_by_harm(GROUPS, lambda _: 1.0, found)
    assert sorted(ordered) == GROUPS
    assert found == {"groups_not_tried": 3}


def test_a_slow_net_answers_fewer_rows_and_they_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_classifier(tmp_path / "m.onnx", hidden=16)
    rows = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    context = Context(tmp_path, Dataset({"x": rows}, None, 64))
    whole = answers_of(tmp_path / "m.onnx", context, 64)
    monkeypatch.setattr(onnx_sensitivity, "ANSWER_SECONDS", -1.0)
    few = answers_of(tmp_path / "m.onnx", context, 64)
    assert (len(whole), len(few)) == (64, LEAST_ROWS)
    assert relative_error(whole, few) == 0.0
    assert agreement_of(whole, few) == 1.0
    assert relative_error(whole, few + 1) > 0.0
