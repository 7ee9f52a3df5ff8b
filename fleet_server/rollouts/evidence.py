"""Gathers what devices say for and against a rollout's stop rules: each telemetry window counts once.

What a device did before it was sent the version is noted when it is sent. After that its windows are added to its
deployment's `evidence`, and marked as judged in the same transaction; so nothing is counted twice or forgotten when a
server dies, and no tick of the engine reads what an earlier one has read.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from sqlalchemy.orm import Session

from fleet_server.clock import utc_now
from fleet_server.domain.evidence import UNCHANGED, Change, Count, Sample, Tally, change_of, fold
from fleet_server.domain.rules import Outcomes, Standing, judge_counted, judge_sampled
from fleet_server.domain.strategy import RolloutStrategy, StopMetric, StopRule
from fleet_server.models import Deployment, ModelWindowRow, Rollout, Variant
from fleet_server.rollouts import repository
from fleet_server.telemetry.signals import unpack_signals
from fleet_server.telemetry.sketches import unpack_cells, unpack_latency

BEFORE = dt.timedelta(hours=1)
MEANWHILE = dt.timedelta(minutes=10)
CONTROLS = 50  # devices without the version that are looked at, of a profile
WINDOWS = 5_000  # at most in one transaction


def note_before(session: Session, strategy: RolloutStrategy, deployments: Sequence[Deployment]) -> None:
    """Keep what devices did in the hour before they are sent a version, where a stop rule compares with that."""
    if not any(rule.metric.relative for rule in strategy.stop_when):
        return
    before = {one.previous_id: one for one in deployments if one.previous_id}
    totals: dict[str, Sample] = defaultdict(Sample)
    running = {key: one.device_id for key, one in before.items()}
    for deployment_id, window in repository.windows_of(session, running, utc_now() - BEFORE):
        totals[deployment_id] += sample(window)
    for key, deployment in before.items():
        deployment.evidence = _ENCODER.encode(_Kept(before=totals[key]))


def gather(session: Session, rollout: Rollout) -> bool:
    """Add the windows that came since the last time; whether there were any."""
    strategy = RolloutStrategy.model_validate(rollout.strategy)
    rules = {index: rule for index, rule in enumerate(strategy.stop_when) if not rule.metric.counted}
    if not rules:
        return False
    rows = repository.windows_to_judge(session, rollout.id, limit=WINDOWS)
    found: dict[str, list[ModelWindowRow]] = defaultdict(list)
    for deployment_id, window in rows:
        found[deployment_id].append(window)
    changes = _Changes(session, rollout)
    deployments = repository.deployments_of(session, rollout.id, list(found))
    variants = repository.by_id(session, Variant, {one.variant_id for one in deployments})
    for deployment in deployments:
        samples = [sample(window) for window in found[deployment.id]]
        deployment.evidence = _added(deployment.evidence, rules, samples, variants[deployment.variant_id], changes)
    repository.mark_judged(session, [window for _, window in rows])
    return bool(rows)


@dataclass
class _Kept:
    """What is kept of a deployment: what its device did before, and what it says by the number of the rule."""

    before: Sample | None = None
    rules: dict[int, Tally] = field(default_factory=dict)


@dataclass
class _Said:
    """Of what is kept that which rules are judged by: the greater part is for the windows that come next."""

    rules: dict[int, Count]


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(_Kept)
_JUDGED = msgspec.msgpack.Decoder(_Said)


class Judgements:
    """Where rollouts' rules stood when they were last judged: it is not thought through again while nothing is new."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[dict[str, Outcomes], list[Standing]]] = {}

    def of(self, session: Session, rollout: Rollout, found: dict[str, Outcomes], *, news: bool) -> list[Standing]:
        """Where they stand now, by their outcomes; `news` says whether windows were added."""
        known = self._known.get(rollout.id)
        if news or known is None or known[0] != found:
            known = self._known[rollout.id] = (found, standings(session, rollout, found))
        return known[1]

    def keep(self, rollout_ids: Sequence[str]) -> None:
        """Forget all but these."""
        self._known = {key: value for key, value in self._known.items() if key in rollout_ids}


def outcomes(session: Session, rollout: Rollout, sent: Mapping[str, Mapping[str, int]]) -> dict[str, Outcomes]:
    """How deployments of a rollout that were sent have ended, by profile.

    Args:
        session: to read with.
        rollout: whose.
        sent: how many are in each phase, by profile.
    """
    fell_back = {}
    if any(rule["metric"] == StopMetric.FELL_BACK_PERCENT for rule in rollout.strategy.get("stop_when", ())):
        fell_back = repository.fell_back_by_profile(session, rollout.id)
    return {
        name: Outcomes(sent=sum(counts.values()), settled=_of(counts, repository.SETTLED_PHASES),
                       failed=_of(counts, ("failed",)), rolled_back=_of(counts, ("rolled_back",)),
                       fell_back=fell_back.get(name, 0))
        for name, counts in sent.items()
    }  # fmt: skip


def standings(session: Session, rollout: Rollout, ended: Mapping[str, Outcomes]) -> list[Standing]:
    """Where the stop rules stand now.

    Args:
        session: to read with.
        rollout: whose.
        ended: its outcomes.
    """
    strategy = RolloutStrategy.model_validate(rollout.strategy)
    said: Sequence[tuple[str, _Said]] = ()
    if any(not rule.metric.counted for rule in strategy.stop_when):
        rows = repository.evidence_by_profile(session, rollout.id)
        said = [(profile, _JUDGED.decode(packed)) for profile, packed in rows]
    judged = []
    for index, rule in enumerate(strategy.stop_when):
        if rule.metric.counted:
            judged.append(judge_counted(rule, ended))
            continue
        counts: dict[str, list[Count]] = defaultdict(list)
        for profile, one in said:
            if index in one.rules:
                counts[profile].append(one.rules[index])
        judged.append(judge_sampled(rule, counts))
    return judged


def sample(window: ModelWindowRow) -> Sample:
    """A window as rules take it."""
    signals, confusion = unpack_signals(window.signals), unpack_cells(window.confusion)
    memory, temperature = signals.get("agent_rss_mb"), signals.get("temperature_c")
    return Sample(
        requests=window.requests,
        errors=window.errors,
        seconds=(window.ended_at - window.started_at).total_seconds(),
        latency=unpack_latency(window.latency),
        labelled=sum(count for _, _, count in confusion),
        correct=sum(count for label, predicted, count in confusion if label == predicted),
        memory=memory or 0.0,
        hosts=memory is not None,
        temperature=temperature or 0.0,
        temperatures=temperature is not None,
        windows=1,
        crashed=bool(signals.get("crashes")),
        compared=signals.get("compared", 0),
        disagreed=signals.get("disagreed", 0),
        shapes=shapes(signals),
    )


def shapes(signals: Mapping[str, Any]) -> dict[str, dict[int, int]]:
    """A window's histograms, by the names that samples have for them."""
    found = {name: signals[name] for name in ("confidence", "predicted") if signals.get(name)}
    for kind in ("input", "output"):
        for name, sketch in (signals.get(f"{kind}s") or {}).items():
            for part, counts in sketch.items():
                found[f"{kind}:{name}:{part}"] = counts
    return {name: {int(bucket): count for bucket, count in counts.items()} for name, counts in found.items()}


class _Changes:
    """How much the control cohort changed meanwhile: asked for once a profile and rule, and only where a rule asks."""

    def __init__(self, session: Session, rollout: Rollout) -> None:
        self._session = session
        self._rollout = rollout
        self._found: dict[str, list[tuple[Sample, Sample]]] = {}

    def of(self, rule: StopRule, profile_id: str) -> Change:
        if rule.against == "past":
            return UNCHANGED
        if profile_id not in self._found:
            self._found[profile_id] = self._pairs(profile_id)
        return change_of(rule.metric, self._found[profile_id])

    def _pairs(self, profile_id: str) -> list[tuple[Sample, Sample]]:
        """What devices of a profile without the version did before it began, and what they do now."""
        now = utc_now()
        began = self._rollout.stage_started_at or self._rollout.created_at
        middle = max(began, now - MEANWHILE)
        before: dict[str, Sample] = defaultdict(Sample)
        after: dict[str, Sample] = defaultdict(Sample)
        controls = repository.controls(self._session, self._rollout.id, profile_id, limit=CONTROLS)
        running = {deployment_id: device_id for device_id, deployment_id in controls}
        for deployment_id, window in repository.windows_of(self._session, running, began - BEFORE):
            if window.ended_at <= began:
                before[deployment_id] += sample(window)
            elif window.ended_at > middle:
                after[deployment_id] += sample(window)
        return [(before[key], after[key]) for key in running]


def _added(
    packed: bytes | None,
    rules: Mapping[int, StopRule],
    samples: Sequence[Sample],
    variant: Variant,
    changes: _Changes,
) -> bytes:
    kept = _DECODER.decode(packed) if packed else _Kept()
    accuracy = (variant.measurements or {}).get("accuracy")
    for index, rule in rules.items():
        tally = kept.rules.get(index, Tally())
        change = changes.of(rule, variant.profile_id)
        kept.rules[index] = fold(rule, tally, samples, before=kept.before, accuracy=accuracy, change=change)
    return _ENCODER.encode(kept)


def _of(counts: Mapping[str, int], phases: Sequence[str]) -> int:
    return sum(counts.get(phase, 0) for phase in phases)
