"""What measurements of devices say of candidates: pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from agent.protocol.manifest import Precision
from agent.protocol.messages import TrialResult
from converters.job import Candidate, Measurements, Target
from converters.planner import NOISE, choose, excesses, fates
from fleet_server.catalog.schemas import GateCheck

ON_CPU = frozenset({"cpu", "xnnpack", "reference"})


@dataclass(frozen=True)
class Outcome:
    """What came of a variant's candidates on devices.

    Attributes:
        candidates: with the devices' measurements, of which the worst counts, and their fate.
        chosen: index of the picked one; None when none ran on every device.
        plain: fp32's measurements there; None when it did not run.
    """

    candidates: list[Candidate]
    chosen: int | None
    plain: Measurements | None


def choose_on_devices(
    candidates: Sequence[Candidate],
    results: Mapping[str, Mapping[str, TrialResult]],
    target: Target,
    source: Measurements,
    *,
    only: str | None = None,
) -> Outcome:
    """Judge candidates by what devices measured, and pick one.

    Args:
        candidates: of the variant, as they were measured before.
        results: by device id, then by the candidate's digest; devices that finished.
        target: the profile's budgets.
        source: measurements of the source form.
        only: digest of the one candidate that may be picked, where devices run it already.
    """
    found = [_measured(one, results, target) for one in candidates]
    ran = [index for index, (_, measured) in enumerate(found) if measured is not None]
    judged = [one for one, _ in found]
    plain = next((found[index][1] for index in ran if judged[index].precision is Precision.FP32), None)
    for index in ran:
        judged[index] = _judged(judged[index], target, source, plain)
    eligible = [index for index in ran if only is None or judged[index].digest == only]
    picked = choose([judged[index] for index in eligible], target)
    chosen = eligible[picked] if picked is not None else None
    among = ran.index(chosen) if chosen is not None else None
    for index, one in zip(ran, fates([judged[index] for index in ran], among, target, source), strict=True):
        judged[index] = one if index == chosen else _with_refusal(one, target, plain)
    return Outcome(judged, chosen, plain)


def device_checks(chosen: Measurements, plain: Measurements | None, target: Target) -> list[GateCheck]:
    """What only devices can say of the picked candidate: where it ran, and whether fp32 would have been faster."""
    checks = []
    if target.objective != "size":
        ratio = _times_fp32(chosen, plain)
        said = "fp32 did not run there" if ratio is None else f"{ratio:.2f} times fp32's median time"
        holds = ratio is None or ratio <= NOISE
        checks.append(_check("against_fp32", ratio, NOISE, "times", f"{said}, at most {NOISE:g}", holds=holds))
    holds = not _fell_back(chosen.provider, target)
    asked = ", ".join(target.providers) or "cpu"
    checks.append(_check("provider", None, None, "", f"ran on {chosen.provider}, asked for {asked}", holds=holds))
    return checks


def _check(name: str, value: float | None, limit: float | None, unit: str, detail: str, *, holds: bool) -> GateCheck:
    return GateCheck(name=name, value=value, limit=limit, unit=unit, holds=holds, detail=detail)


def _measured(
    one: Candidate, results: Mapping[str, Mapping[str, TrialResult]], target: Target
) -> tuple[Candidate, Measurements | None]:
    """A candidate with the worst that any device measured, and that alone; as it was where it did not run."""
    digest = one.digest or ""
    mine = {device: of_device[digest] for device, of_device in results.items() if digest in of_device}
    if one.measurements is None:
        return one, None
    if not mine or len(mine) < len(results):
        fate = "not measured on a device: not among the fastest that keep the accuracy"
        return msgspec.structs.replace(one, within_budgets=False, on_front=False, fate=fate), None
    for device, result in mine.items():
        if result.failure is not None:
            fate = f"did not run on {device}: {result.failure.detail}"
            return msgspec.structs.replace(one, within_budgets=False, on_front=False, fate=fate), None
    all_of = list(mine.values())

    def worst(read: Callable[[TrialResult], float | None], pick: Callable[[list[float]], float]) -> float | None:
        values = [value for result in all_of if (value := read(result)) is not None]
        return pick(values) if len(values) == len(all_of) else None

    agreement = worst(lambda result: result.agreement, min)
    strayed = 0.0 if agreement is None else max(0.0, one.measurements.agreement - agreement)
    near = one.measurements.fidelity
    fallen = next((result.provider for result in all_of if _fell_back(result.provider, target)), None)
    measurements = msgspec.structs.replace(
        one.measurements,
        samples=min(result.samples for result in all_of),
        accuracy=worst(lambda result: result.accuracy, min),
        agreement=one.measurements.agreement if agreement is None else agreement,
        # Where it answers otherwise on the device than here, that counts in full.
        fidelity=None if near is None else max(0.0, near - strayed),
        latency_p50_ms=max(result.latency_p50_ms for result in all_of),
        latency_p95_ms=max(result.latency_p95_ms for result in all_of),
        latency_p99_ms=max(result.latency_p99_ms for result in all_of),
        load_s=max(result.load_s for result in all_of),
        memory_mb=worst(lambda result: result.peak_memory_mb, max),
        provider=fallen or all_of[0].provider,
        against_fp32=worst(lambda result: result.against_reference, max),
        measured_on=", ".join(sorted(mine)),
    )
    return msgspec.structs.replace(one, measurements=measurements), measurements


def _fell_back(provider: str, target: Target) -> bool:
    """Whether an accelerator was asked for first and the processor ran it."""
    wanted = target.providers[0].lower() if target.providers else "cpu"
    return wanted not in ON_CPU and provider.lower() in ON_CPU


def _judged(one: Candidate, target: Target, source: Measurements, plain: Measurements | None) -> Candidate:
    assert one.measurements is not None
    holds = not excesses(one.measurements, target, source) and _refusal(one.measurements, target, plain) is None
    return msgspec.structs.replace(one, within_budgets=holds)


def _refusal(measured: Measurements, target: Target, plain: Measurements | None) -> str | None:
    if _fell_back(measured.provider, target):
        return f"fell back from {target.providers[0]} to {measured.provider} on the device"
    ratio = _times_fp32(measured, plain)
    if ratio is not None and target.objective != "size" and ratio > NOISE:
        return f"slower than fp32 on the device: {ratio:.2f} times its time"
    return None


def _times_fp32(measured: Measurements, plain: Measurements | None) -> float | None:
    """How many times fp32's time it takes: as timed in turns where it was, else by the medians of their own runs."""
    if measured.against_fp32 is not None:
        return measured.against_fp32
    return measured.latency_p50_ms / plain.latency_p50_ms if plain is not None else None


def _with_refusal(one: Candidate, target: Target, plain: Measurements | None) -> Candidate:
    refusal = _refusal(one.measurements, target, plain) if one.measurements is not None else None
    return one if refusal is None else msgspec.structs.replace(one, fate=refusal)
