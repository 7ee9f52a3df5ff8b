"""What a device's windows say for and against a stop rule: trials, of which some hit.

Of a share (errors, wrong answers) every request is a trial, and hits with at most the share that the rule allows. Of
anything else a trial is a block: as many consecutive windows of one device as it takes to have `min_samples`. It hits
when its value is above the rule's bound, whatever by: a sign test. So one slow minute weighs as much as any other
block, and it need not be known how values scatter. While a version is no worse than the bound, a block hits with a
chance of at most one half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from agent.protocol.histogram import merge, percentile
from fleet_server.domain.drift import ks_distance, mean_confidence, psi
from fleet_server.domain.strategy import StopMetric, StopRule

ENOUGH_BEFORE = 20  # requests of the version before, without which nothing is compared with it
RAREST = 1e-4  # of a share that can be told from none


@dataclass(frozen=True)
class Sample:
    """What one device did with one version in one or more windows. Times are seconds, memory MiB.

    Attributes:
        latency: histogram of `agent.protocol.histogram`.
        labelled: rows whose label somebody sent.
        correct: of those, how many were predicted so.
        memory: sum of the agent's memory at the windows' ends; None of `hosts` windows said it.
        hosts: windows that said how the device itself was.
        temperature: sum of the hottest sensor's degrees Celsius.
        temperatures: windows that said it.
        windows: telemetry windows.
        crashed: of those, in how many the worker died or hung.
        compared: rows of which a shadow's answers were compared with those that were served.
        disagreed: of those, how many it answered otherwise.
        shapes: histograms of a sample of the rows, of `agent.protocol.sketch`: `confidence`, `predicted`, and of
            tensors `input:NAME:mean`, `input:NAME:deviation`, `output:NAME:mean`.
    """

    requests: int = 0
    errors: int = 0
    seconds: float = 0.0
    latency: Mapping[int, int] = field(default_factory=dict)
    labelled: int = 0
    correct: int = 0
    memory: float = 0.0
    hosts: int = 0
    temperature: float = 0.0
    temperatures: int = 0
    windows: int = 0
    crashed: int = 0
    compared: int = 0
    disagreed: int = 0
    shapes: Mapping[str, Mapping[int, int]] = field(default_factory=dict)

    def __add__(self, other: Sample) -> Sample:
        latency = dict(self.latency)
        merge(latency, other.latency)
        shapes = {name: dict(self.shapes.get(name, {})) for name in {*self.shapes, *other.shapes}}
        for name, counts in other.shapes.items():
            merge(shapes[name], counts)
        return Sample(
            self.requests + other.requests,
            self.errors + other.errors,
            self.seconds + other.seconds,
            latency,
            self.labelled + other.labelled,
            self.correct + other.correct,
            self.memory + other.memory,
            self.hosts + other.hosts,
            self.temperature + other.temperature,
            self.temperatures + other.temperatures,
            self.windows + other.windows,
            self.crashed + other.crashed,
            self.compared + other.compared,
            self.disagreed + other.disagreed,
            shapes,
        )


@dataclass(frozen=True)
class Count:
    """What one device says about one rule so far: all that the rule is judged by.

    Attributes:
        hits: trials that speak against the version.
        trials: all of them.
        bound: the share of hits that is allowed.
        mean: of the trials' values, in the metric's unit; of a share its value over all of them.
    """

    hits: int = 0
    trials: int = 0
    bound: float = 0.5
    mean: float = 0.0


@dataclass(frozen=True)
class Tally(Count):
    """A count that windows are added to.

    Attributes:
        rest: of the block that is not full.
    """

    rest: Sample = field(default_factory=Sample)

    def plus(self, value: float, *, above: bool) -> Tally:
        """With one more full block; a new one begins."""
        trials = self.trials + 1
        return Tally(self.hits + above, trials, self.bound, self.mean + (value - self.mean) / trials)


@dataclass(frozen=True)
class Change:
    """How much devices that do not have the version changed meanwhile: what is taken off a value."""

    factor: float = 1.0
    offset: float = 0.0


UNCHANGED = Change()


def fold(
    rule: StopRule,
    tally: Tally,
    samples: Iterable[Sample],
    *,
    before: Sample | None,
    accuracy: float | None = None,
    change: Change = UNCHANGED,
) -> Tally:
    """Add windows, in the order they ended, to what a device says about a rule.

    Args:
        rule: a sampled one.
        tally: so far.
        samples: one a window.
        before: what the device did before it had the version; None where it ran nothing.
        accuracy: that the gate measured of the variant.
        change: of the control cohort.
    """
    if rule.metric.share:
        return _fold_share(rule, tally, samples, accuracy)
    for sample in samples:
        block = tally.rest + sample
        if block.requests < rule.min_samples:
            tally = replace(tally, rest=block)
            continue
        value = value_of(rule.metric, block, before)
        if value is None:
            tally = replace(tally, rest=Sample())
            continue
        value = value / change.factor - change.offset
        tally = tally.plus(value, above=value > rule.above)
    return tally


def _fold_share(rule: StopRule, tally: Tally, samples: Iterable[Sample], accuracy: float | None) -> Tally:
    total = sum(samples, Sample())
    allowed = 0.0
    if rule.metric is StopMetric.ERROR_PERCENT:
        hits, trials = total.errors, total.requests
    elif rule.metric is StopMetric.CRASHED_WINDOWS_PERCENT:
        hits, trials = total.crashed, total.windows
    elif rule.metric is StopMetric.DISAGREEMENT_PERCENT:
        hits, trials = total.disagreed, total.compared
    elif accuracy is not None:
        hits, trials, allowed = total.labelled - total.correct, total.labelled, 1 - accuracy
    else:
        return tally
    hits, trials = tally.hits + hits, tally.trials + trials
    bound = min(max(allowed + rule.above / 100, RAREST), 1 - RAREST)
    return Tally(hits, trials, bound, 100 * (hits / trials - allowed) if trials else 0.0)


def value_of(metric: StopMetric, now: Sample, before: Sample | None) -> float | None:
    """A metric of a block; None where it can't be told. Not of a share."""
    if metric.relative and (before is None or before.requests < ENOUGH_BEFORE):
        return None
    return _VALUES[metric](now, before or Sample())


def change_of(metric: StopMetric, changes: Iterable[tuple[Sample, Sample]]) -> Change:
    """How much devices changed that do not have the version: the median of them, of `(before, now)`."""
    values = sorted(
        value
        for before, now in changes
        if now.requests >= ENOUGH_BEFORE and (value := value_of(metric, now, before)) is not None
    )
    if not values:
        return UNCHANGED
    middle = values[len(values) // 2]
    if metric in _RATIOS:
        return Change(factor=middle) if middle > 0 else UNCHANGED
    return Change(offset=middle)


Value = Callable[[Sample, Sample], float | None]


def _error_percent(sample: Sample) -> float:
    return 100 * sample.errors / sample.requests if sample.requests else 0.0


def _latency_ratio(quantile: float) -> Value:
    def value(now: Sample, before: Sample) -> float | None:
        old, new = percentile(before.latency, quantile), percentile(now.latency, quantile)
        return new / old if old and new is not None else None

    return value


def _p95_ms(now: Sample, _before: Sample) -> float | None:
    seconds = percentile(now.latency, 0.95)
    return None if seconds is None else seconds * 1000


def _throughput_drop(now: Sample, before: Sample) -> float | None:
    if not before.seconds or not before.requests or not now.seconds:
        return None
    return 100 * (1 - (now.requests / now.seconds) / (before.requests / before.seconds))


def _memory_rise(now: Sample, before: Sample) -> float | None:
    return now.memory / now.hosts - before.memory / before.hosts if now.hosts and before.hosts else None


def _temperature(now: Sample, _before: Sample) -> float | None:
    return now.temperature / now.temperatures if now.temperatures else None


def _temperature_rise(now: Sample, before: Sample) -> float | None:
    if not now.temperatures or not before.temperatures:
        return None
    return now.temperature / now.temperatures - before.temperature / before.temperatures


def _confidence_drop(now: Sample, before: Sample) -> float | None:
    old, new = (mean_confidence(one.shapes.get("confidence", {})) for one in (before, now))
    return None if old is None or new is None else 100 * (old - new)


def _confidence_shift(now: Sample, before: Sample) -> float | None:
    return ks_distance(before.shapes.get("confidence", {}), now.shapes.get("confidence", {}))


def _output_drift(now: Sample, before: Sample) -> float | None:
    classes = psi(before.shapes.get("predicted", {}), now.shapes.get("predicted", {}), ordered=False)
    return classes if classes is not None else _tensor_drift(now, before, "output:")


def _input_drift(now: Sample, before: Sample) -> float | None:
    return _tensor_drift(now, before, "input:")


def _tensor_drift(now: Sample, before: Sample, prefix: str) -> float | None:
    names = sorted(name for name in {*now.shapes} & {*before.shapes} if name.startswith(prefix))
    found = [psi(before.shapes[name], now.shapes[name], ordered=True) for name in names]
    return max((one for one in found if one is not None), default=None)


_RATIOS = {StopMetric.LATENCY_P50_RATIO, StopMetric.LATENCY_P95_RATIO, StopMetric.LATENCY_P99_RATIO}
_VALUES: dict[StopMetric, Value] = {
    StopMetric.ERROR_RISE_POINTS: lambda now, before: _error_percent(now) - _error_percent(before),
    StopMetric.LATENCY_P95_MS: _p95_ms,
    StopMetric.LATENCY_P50_RATIO: _latency_ratio(0.5),
    StopMetric.LATENCY_P95_RATIO: _latency_ratio(0.95),
    StopMetric.LATENCY_P99_RATIO: _latency_ratio(0.99),
    StopMetric.THROUGHPUT_DROP_PERCENT: _throughput_drop,
    StopMetric.MEMORY_RISE_MB: _memory_rise,
    StopMetric.TEMPERATURE_C: _temperature,
    StopMetric.TEMPERATURE_RISE_C: _temperature_rise,
    StopMetric.CONFIDENCE_DROP_POINTS: _confidence_drop,
    StopMetric.CONFIDENCE_SHIFT: _confidence_shift,
    StopMetric.OUTPUT_DRIFT: _output_drift,
    StopMetric.INPUT_DRIFT: _input_drift,
}
