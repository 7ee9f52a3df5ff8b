"""The gate: pure. A variant passes only when every check holds; what could not be measured does not hold."""

from __future__ import annotations

import msgspec

from converters.job import Candidate, Measurements
from fleet_server.catalog.schemas import SERVER, GateCheck, GateSpec, GateVerdict
from fleet_server.devices.schemas import Budgets


class References(msgspec.Struct, frozen=True):
    """What candidates are judged against, all measured on the version's evaluation data.

    Attributes:
        source: the source form.
        baseline: what an earlier version runs on the profile; None when there is none.
        baseline_version: its version.
    """

    source: Measurements
    baseline: Measurements | None = None
    baseline_version: str | None = None


def judge(
    references: References, chosen: Candidate, budgets: Budgets, gate: GateSpec, *, measured_on: str = SERVER
) -> GateVerdict:
    """Judge the chosen candidate.

    Accuracy is that on the evaluation labels; where there are none, fidelity to the source stands for it.
    """
    measured = chosen.measurements
    if measured is None or measured.samples == 0:
        detail = "there was no evaluation data to measure it on: push the version with an evaluation set"
        check = GateCheck(name="evaluation", value=0.0, limit=1.0, unit="rows", holds=False, detail=detail)
        return GateVerdict(passed=False, measured_on=measured_on, checks=[check])
    checks = []
    if budgets.accuracy_drop_points is not None:
        if measured.accuracy is not None and references.source.accuracy is not None:
            drop = (references.source.accuracy - measured.accuracy) * 100
            subject = "accuracy lost against the source"
        else:
            drop = (1 - msgspec.structs.replace(measured, accuracy=None).quality) * 100
            subject = "share in which answers differ from the source's"
        checks.append(_at_most("accuracy_drop", drop, budgets.accuracy_drop_points, "points", subject))
    baseline = references.baseline.accuracy if references.baseline else None
    if gate.max_regression_points is not None and baseline is not None:
        loss = None if measured.accuracy is None else (baseline - measured.accuracy) * 100
        subject = f"accuracy lost against version {references.baseline_version}"
        checks.append(_at_most("regression", loss, gate.max_regression_points, "points", subject))
    if gate.min_accuracy is not None:
        checks.append(_at_least("min_accuracy", measured.accuracy, gate.min_accuracy, "", "accuracy"))
    bounds = (
        ("latency_p95", measured.latency_p95_ms, budgets.latency_p95_ms, "ms", "95th percentile of one inference"),
        ("size", measured.size / 1e6, budgets.size_mb, "MB", "artifact size"),
        ("memory", measured.memory_mb, budgets.memory_mb, "MiB", "memory that loading it adds"),
    )
    checks += [_at_most(name, value, limit, unit, of) for name, value, limit, unit, of in bounds if limit is not None]
    return GateVerdict(passed=all(check.holds for check in checks), measured_on=measured_on, checks=checks)


def _at_most(name: str, value: float | None, limit: float, unit: str, subject: str) -> GateCheck:
    holds = value is not None and value <= limit
    return _check(name, value, limit, unit, f"{subject}: {_said(value, unit)}, at most {limit:g} {unit}", holds=holds)


def _at_least(name: str, value: float | None, limit: float, unit: str, subject: str) -> GateCheck:
    holds = value is not None and value >= limit
    return _check(name, value, limit, unit, f"{subject}: {_said(value, unit)}, at least {limit:g} {unit}", holds=holds)


def _check(name: str, value: float | None, limit: float, unit: str, detail: str, *, holds: bool) -> GateCheck:
    return GateCheck(name=name, value=value, limit=limit, unit=unit, holds=holds, detail=detail.rstrip())


def _said(value: float | None, unit: str) -> str:
    return "not measured" if value is None else f"{value:.4g} {unit}".rstrip()
