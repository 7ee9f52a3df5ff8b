"""The gate: every bound alone, on both sides of it, and what was not measured."""

from __future__ import annotations

from typing import Any

import pytest

from agent.protocol.manifest import Precision
from converters.job import BuildResult, Candidate, Measurements
from fleet_server.catalog.schemas import GateSpec
from fleet_server.conversions.gate import judge
from fleet_server.devices.schemas import Budgets

NONE = Budgets(accuracy_drop_points=None)
ANY = GateSpec(max_regression_points=None)


def measured(**fields: Any) -> Measurements:
    whole: dict[str, Any] = {
        "size": 4_000_000, "samples": 100, "accuracy": 0.9, "macro_precision": 0.9, "macro_recall": 0.9,
        "macro_f1": 0.9, "classes": (), "agreement": 0.97, "max_difference": 0.1, "latency_p50_ms": 4.0,
        "latency_p95_ms": 5.0, "memory_mb": 60.0, "provider": "cpu",
    }  # fmt: skip
    return Measurements(**{**whole, **fields})


def verdict(
    chosen: Measurements | None,
    budgets: Budgets = NONE,
    gate: GateSpec = ANY,
    source: Measurements | None = None,
    baseline: Measurements | None = None,
) -> dict[str, bool]:
    """Which checks hold; `passed` must be all of them."""
    candidate = Candidate("recipe", Precision.INT8, measurements=chosen)
    result = BuildResult(source or measured(accuracy=0.92), (candidate,), 0, baseline, "1" if baseline else None)
    judged = judge(result, candidate, budgets, gate)
    assert judged.passed == all(check.holds for check in judged.checks)
    assert all(check.detail for check in judged.checks)
    return {check.name: check.holds for check in judged.checks}


@pytest.mark.parametrize(
    ("budget", "value", "holds"),
    [
        ("latency_p95_ms", 5.0, True),
        ("latency_p95_ms", 4.9, False),
        ("size_mb", 4.0, True),
        ("size_mb", 3.9, False),
        ("memory_mb", 60.0, True),
        ("memory_mb", 59.0, False),
        ("accuracy_drop_points", 2.01, True),
        ("accuracy_drop_points", 1.9, False),
    ],
)
def test_a_budget(budget: str, value: float, holds: bool) -> None:
    (found,) = verdict(measured(), NONE.model_copy(update={budget: value})).values()
    assert found is holds


def test_an_accuracy_the_version_demands() -> None:
    assert verdict(measured(), gate=ANY.model_copy(update={"min_accuracy": 0.9})) == {"min_accuracy": True}
    assert verdict(measured(), gate=ANY.model_copy(update={"min_accuracy": 0.91})) == {"min_accuracy": False}


def test_the_version_before() -> None:
    gate = GateSpec(max_regression_points=2.0)
    assert verdict(measured(), gate=gate, baseline=measured(accuracy=0.91)) == {"regression": True}
    assert verdict(measured(), gate=gate, baseline=measured(accuracy=0.93)) == {"regression": False}
    assert verdict(measured(), gate=gate) == {}, "there is none"


def test_without_labels_agreement_stands_for_accuracy() -> None:
    unlabelled, source = measured(accuracy=None), measured(accuracy=None)
    assert verdict(unlabelled, Budgets(accuracy_drop_points=3.1), source=source) == {"accuracy_drop": True}
    assert verdict(unlabelled, Budgets(accuracy_drop_points=2.9), source=source) == {"accuracy_drop": False}


def test_what_was_not_measured_does_not_pass() -> None:
    assert verdict(None) == {"evaluation": False}
    assert verdict(measured(samples=0)) == {"evaluation": False}
    assert verdict(measured(accuracy=None), gate=ANY.model_copy(update={"min_accuracy": 0.1})) == {
        "min_accuracy": False
    }
    assert verdict(measured(memory_mb=None), Budgets(accuracy_drop_points=None, memory_mb=1e6)) == {"memory": False}
    assert verdict(measured(latency_p95_ms=float("nan")), Budgets(accuracy_drop_points=None, latency_p95_ms=1e6)) == {
        "latency_p95": False
    }
    lost = verdict(measured(accuracy=None), gate=GateSpec(), baseline=measured())
    assert lost == {"regression": False}
