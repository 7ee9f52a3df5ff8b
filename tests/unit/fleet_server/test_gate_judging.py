"""What devices' measurements say of candidates."""

from __future__ import annotations

from typing import Any

import msgspec

from agent.protocol.errors import WireErrorCode
from agent.protocol.manifest import Precision, RuntimeName
from agent.protocol.messages import Failure, TrialResult
from converters.job import Candidate, Measurements, Target
from fleet_server.gates.judging import choose_on_devices, device_checks

TARGET = Target("p", RuntimeName.ONNX, ("cpu",), (Precision.FP32, Precision.INT8), accuracy_drop_points=1.0)
ON_SERVER = Measurements(
    size=100, samples=50, accuracy=0.9, macro_precision=None, macro_recall=None, macro_f1=None, classes=(),
    agreement=1.0, max_difference=0.0, latency_p50_ms=1.0, latency_p95_ms=2.0, memory_mb=5.0, provider="cpu",
)  # fmt: skip
FP32 = Candidate("onnx-fp32", Precision.FP32, path="a", digest="a" * 64, measurements=ON_SERVER, within_budgets=True)
INT8 = msgspec.structs.replace(FP32, recipe="onnx-static-u8s8", precision=Precision.INT8, digest="b" * 64)
OTHER = msgspec.structs.replace(FP32, recipe="onnx-dynamic", precision=Precision.DYNAMIC_INT8, digest="c" * 64)


def result(candidate: Candidate, **fields: Any) -> TrialResult:
    plain = {
        "runtime": "r", "provider": "cpu", "load_s": 0.1, "latency_p50_ms": 10.0, "latency_p95_ms": 11.0,
        "latency_p99_ms": 12.0, "peak_memory_mb": 20.0, "samples": 50, "accuracy": 0.9, "agreement": 1.0,
    }  # fmt: skip
    return TrialResult(candidate.digest or "", **{**plain, **fields})


def judged(*results: TrialResult, target: Target = TARGET, more: dict[str, tuple[TrialResult, ...]] | None = None):
    by_device = {"d1": results, **(more or {})}
    found = {device: {one.digest: one for one in of_device} for device, of_device in by_device.items()}
    return choose_on_devices([FP32, INT8, OTHER], found, target, ON_SERVER)


def fate(outcome: Any, candidate: Candidate) -> str:
    return next(one.fate for one in outcome.candidates if one.recipe == candidate.recipe)


def test_the_device_decides_what_is_fastest() -> None:
    outcome = judged(result(FP32), result(INT8, latency_p50_ms=30.0), result(OTHER, latency_p50_ms=4.0))
    assert outcome.chosen == 2
    assert outcome.candidates[2].measurements.latency_p50_ms == 4.0
    assert outcome.candidates[2].measurements.measured_on == "d1"
    assert fate(outcome, INT8) == "slower than fp32 on the device: 3.00 times its time"
    checks = device_checks(outcome.candidates[2].measurements, outcome.plain, TARGET)
    assert all(check.holds for check in checks)


def test_slower_than_fp32_everywhere_means_fp32() -> None:
    outcome = judged(result(FP32), result(INT8, latency_p50_ms=11.0), result(OTHER, latency_p50_ms=12.0))
    assert outcome.chosen == 0


def test_who_asks_for_size_gets_size() -> None:
    target = msgspec.structs.replace(TARGET, objective="size")
    small = msgspec.structs.replace(INT8, measurements=msgspec.structs.replace(ON_SERVER, size=25))
    results = {"d1": {one.digest: one for one in (result(FP32), result(small, latency_p50_ms=30.0))}}
    outcome = choose_on_devices([FP32, small], results, target, ON_SERVER)
    assert outcome.chosen == 1
    names = [check.name for check in device_checks(outcome.candidates[1].measurements, outcome.plain, target)]
    assert names == ["provider"]


def test_a_fall_back_to_the_processor_is_refused() -> None:
    target = msgspec.structs.replace(TARGET, providers=("cuda", "cpu"))
    outcome = judged(
        result(FP32, provider="cuda"), result(INT8, latency_p50_ms=1.0), result(OTHER, provider="cuda"), target=target
    )
    assert fate(outcome, INT8) == "fell back from cuda to cpu on the device"
    assert outcome.chosen != 1
    fallen = judged(result(FP32), result(INT8), result(OTHER), target=target)
    assert fallen.chosen is not None
    checks = device_checks(fallen.candidates[fallen.chosen].measurements, fallen.plain, target)
    assert [check.name for check in checks if not check.holds] == ["provider"]
    assert "ran on cpu, asked for cuda, cpu" in checks[-1].detail


def test_times_in_turns_decide_whether_it_is_slower_than_fp32() -> None:
    noisy = result(INT8, latency_p50_ms=30.0, against_reference=0.6)
    slow = result(OTHER, latency_p50_ms=4.0, against_reference=1.2)
    outcome = judged(result(FP32), noisy, slow)
    assert fate(outcome, OTHER) == "slower than fp32 on the device: 1.20 times its time"
    assert not fate(outcome, INT8).startswith("slower than fp32 on the device")
    assert outcome.candidates[1].measurements.against_fp32 == 0.6


def test_the_worst_device_counts() -> None:
    fast = (result(FP32), result(INT8, latency_p50_ms=1.0, accuracy=0.9))
    slow = (result(FP32, latency_p50_ms=50.0), result(INT8, latency_p50_ms=3.0, accuracy=0.895, peak_memory_mb=70.0))
    outcome = judged(*fast, more={"d2": slow})
    measured = outcome.candidates[1].measurements
    assert outcome.chosen == 1
    assert (measured.latency_p50_ms, measured.accuracy, measured.memory_mb) == (3.0, 0.895, 70.0)
    assert measured.measured_on == "d1, d2"


def test_a_budget_that_a_device_breaks_refuses_the_candidate() -> None:
    target = msgspec.structs.replace(TARGET, memory_mb=30.0, latency_p95_ms=20.0)
    outcome = judged(
        result(FP32), result(INT8, latency_p50_ms=1.0, peak_memory_mb=40.0),
        result(OTHER, latency_p50_ms=1.0, accuracy=0.5), target=target,
    )  # fmt: skip
    assert outcome.chosen == 0
    assert fate(outcome, INT8) == "over budget: 40 MiB of 30 allowed"
    assert "loses 40.00 points" in fate(outcome, OTHER)


def test_what_did_not_run_or_was_not_sent_is_not_picked() -> None:
    broken = Failure(WireErrorCode.LOAD_FAILED, "no such operator")
    outcome = judged(result(FP32), TrialResult(INT8.digest or "", failure=broken))
    assert outcome.chosen == 0
    assert fate(outcome, INT8) == "did not run on d1: no such operator"
    assert fate(outcome, OTHER).startswith("not measured on a device")
    nothing = judged(TrialResult(FP32.digest or "", failure=broken))
    assert nothing.chosen is None


def test_a_second_run_judges_by_its_own_measurements() -> None:
    first = judged(result(FP32), result(INT8, latency_p50_ms=1.0), result(OTHER))
    broken = Failure(WireErrorCode.LOAD_FAILED, "gone")
    again = {"d2": {one.digest: one for one in (result(FP32), TrialResult(INT8.digest or "", failure=broken))}}
    second = choose_on_devices(first.candidates, again, TARGET, ON_SERVER)
    assert second.chosen == 0


def test_what_devices_run_is_the_only_one_that_may_be_picked() -> None:
    results = {"d1": {one.digest: one for one in (result(FP32), result(INT8, latency_p50_ms=1.0))}}
    outcome = choose_on_devices([FP32, INT8], results, TARGET, ON_SERVER, only=FP32.digest)
    assert outcome.chosen == 0
