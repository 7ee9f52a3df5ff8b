"""Watches versions that have just begun to serve; says when the watching is over, or why one did badly: pure.

It sees the worker's counts since each artifact was loaded, a second apart. What is judged, and by which numbers, comes
with the deployment (`agent.protocol.messages.ProbationPolicy`); how many samples a judgement needs is said here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import msgspec

from agent.protocol.histogram import percentile
from agent.protocol.messages import ProbationPolicy, ProbationReport
from agent.serving.ipc import Counts, Peeked

ASK_S = 1.0
SILENT_ASKS = 20  # questions without an answer after which a worker is stuck; time alone may be the supervisor's own
STUCK_S = 10.0  # so is a request that waits so long, and many times longer than those of the version before
STUCK_TIMES = 10.0
FEWEST_LATENCIES = 20  # of either version, to compare 95th percentiles at the end
ENOUGH_LATENCIES = 100  # of the new one, to end its time early: by then two slow ones are no 95th percentile
SLACK_S = 0.002  # what a 95th percentile may be longer whatever its ratio: below that the machine's noise decides
QUARTERS = 4
GROWTH_SAMPLES = 12
MOST_SAMPLES = 4096


NOTHING = Counts("")


@dataclass
class _Watch:
    policy: ProbationPolicy
    before_id: str | None
    since: float
    before_mb: float | None
    report: ProbationReport
    now: Counts | None = None
    before: Counts | None = None
    earlier: Counts = NOTHING  # what it had done when this watching began
    all: Counts | None = None  # that it did since it was loaded
    rss_mb: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Over:
    """The watching of a deployment ended.

    Attributes:
        deployment_id: that was watched.
        problem: why it is taken back; None when it stays.
        report: what was seen.
        silent: whether the worker did not answer: nothing it is told will help.
    """

    deployment_id: str
    problem: str | None
    report: ProbationReport
    silent: bool = False


class Probation:
    """The versions that are being watched. The clock is passed in, in seconds."""

    def __init__(self) -> None:
        self._watched: dict[str, _Watch] = {}
        self._asked_at = float("-inf")
        self._unanswered = 0

    def asks(self, now: float) -> bool:
        """Whether the worker is to be asked what it counted: every second, and when the time of a watching is over."""
        ends = [watch.since + watch.policy.seconds for watch in self._watched.values()]
        if not ends or (now - self._asked_at < ASK_S and not any(self._asked_at < end <= now for end in ends)):
            return False
        self._asked_at = now
        self._unanswered += 1
        return True

    def begin(
        self,
        deployment_id: str,
        policy: ProbationPolicy,
        now: float,
        *,
        before_id: str | None = None,
        before_mb: float | None = None,
        provider: str = "",
        note: str = "",
    ) -> None:
        """Watch a deployment that serves from now on, or runs beside another.

        Where it is watched already, it is judged by what it does from now on.

        Args:
            deployment_id: to watch.
            policy: by which it is judged.
            now: seconds.
            before_id: the deployment that served before, and is still loaded.
            before_mb: resident memory of the worker before it was loaded.
            provider: execution provider that runs it.
            note: for people.
        """
        if not self._watched:
            self._unanswered = 0
        known = self._watched.get(deployment_id)
        earlier = (known.all if known else None) or NOTHING
        report = ProbationReport(provider=provider, note=note)
        self._watched[deployment_id] = _Watch(policy, before_id, now, before_mb, report, earlier=earlier)

    def counted(self, peeked: Peeked, now: float) -> None:
        """Take in what the worker counted."""
        self._unanswered = 0
        found = {one.deployment_id: one for one in peeked.models}
        for deployment_id, watch in self._watched.items():
            watch.all = found.get(deployment_id, watch.all)
            watch.now = _since(watch.earlier, watch.all) if watch.all else None
            watch.before = found.get(watch.before_id or "", watch.before)
            watch.rss_mb.append(peeked.rss_mb)
            if len(watch.rss_mb) > MOST_SAMPLES:
                del watch.rss_mb[1::2]
            watch.report = _seen(watch, now)

    def report(self, deployment_id: str) -> ProbationReport | None:
        """What was seen so far of a deployment; None when it is not watched."""
        watch = self._watched.get(deployment_id)
        return watch.report if watch else None

    @property
    def watched(self) -> frozenset[str]:
        """The deployments that are watched."""
        return frozenset(self._watched)

    def tick(self, now: float) -> list[Over]:
        """Which watchings are over, by time or by a problem. Time alone ends none: the counts of its end must be in."""
        found = []
        for deployment_id, watch in list(self._watched.items()):
            problem = judge(watch, now)
            silent = problem is None and self._unanswered > SILENT_ASKS
            if silent:
                waited = SILENT_ASKS * ASK_S
                problem = f"the inference worker did not answer for {waited:.0f} s while the version was watched"
            if problem or _done(watch):
                del self._watched[deployment_id]
                found.append(Over(deployment_id, problem, watch.report, silent))
        return found

    def end(self, deployment_id: str) -> ProbationReport | None:
        """Watch a deployment no more; returns what was seen of it."""
        watch = self._watched.pop(deployment_id, None)
        return watch.report if watch else None

    def clear(self) -> dict[str, ProbationReport]:
        """The worker died, and with it what was watched; returns what was seen until then."""
        seen = {key: watch.report for key, watch in self._watched.items()}
        self._watched.clear()
        return seen


def _seen(watch: _Watch, now: float) -> ProbationReport:
    counts = watch.now or NOTHING
    recent = watch.before.recent if watch.before else {}
    comparable = sum(recent.values()) >= FEWEST_LATENCIES
    return ProbationReport(
        watched_s=round(now - watch.since, 3),
        requests=counts.requests,
        errors=counts.errors,
        rejected=counts.rejected,
        latency_p95_ms=_ms(percentile(counts.latency, 0.95)),
        before_p95_ms=_ms(percentile(recent, 0.95)) if comparable else None,
        memory_mb=None if watch.before_mb is None else round(watch.rss_mb[-1] - watch.before_mb, 1),
        provider=watch.report.provider,
        exercised=counts.requests >= watch.policy.minimum_requests,
        note=watch.report.note,
    )


def _since(earlier: Counts, now: Counts) -> Counts:
    """What was done between two counts."""
    latency = {bucket: count - earlier.latency.get(bucket, 0) for bucket, count in now.latency.items()}
    return msgspec.structs.replace(
        now,
        requests=now.requests - earlier.requests,
        errors=now.errors - earlier.errors,
        rejected=now.rejected - earlier.rejected,
        latency={bucket: count for bucket, count in latency.items() if count},
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 4)


def _done(watch: _Watch) -> bool:
    """Whether the counts say that its time is over, and that it was used enough or will not be.

    While a request is still being answered that has waited as long as the version was watched, it goes on: a version
    that never answers must not be found good for having no errors.
    """
    seen, policy = watch.report, watch.policy
    if seen.watched_s < policy.seconds:
        return False
    if watch.now is not None and watch.now.oldest_s >= min(1.0, seen.watched_s) and seen.watched_s < _patience(watch):
        return False
    return seen.exercised or seen.watched_s >= policy.longest_s


def _patience(watch: _Watch) -> float:
    """How long the watching waits for a request that is not answered, in seconds."""
    return watch.policy.longest_s + 2 * _stuck_after(watch)


def _stuck_after(watch: _Watch) -> float:
    return max(STUCK_S, STUCK_TIMES * (watch.report.before_p95_ms or 0.0) / 1000)


def judge(watch: _Watch, now: float) -> str | None:
    """Why a version is to be taken back, in a sentence; None while nothing speaks against it."""
    if watch.now is None:
        return None
    problems = (_errors(watch), _rejections(watch), _stuck(watch), _latency(watch), _memory(watch), _growth(watch, now))
    return next((one for one in problems if one), None)


def _errors(watch: _Watch) -> str | None:
    seen, policy = watch.report, watch.policy
    if seen.requests < max(policy.minimum_requests, 1) or seen.errors <= seen.requests * policy.error_share:
        return None
    return f"{seen.errors} of {seen.requests} requests failed while the version was watched"


def _rejections(watch: _Watch) -> str | None:
    """Requests that the version before took, and this one does not: its inputs have other names or shapes."""
    seen, before = watch.report, watch.before
    asked = seen.requests + seen.rejected
    if asked < max(watch.policy.minimum_requests, 1) or before is None or before.requests < FEWEST_LATENCIES:
        return None
    usual = before.rejected / (before.requests + before.rejected)
    if seen.rejected / asked <= usual + watch.policy.error_share:
        return None
    return (
        f"{seen.rejected} of {asked} requests were refused while the version was watched, and {100 * usual:.0f} % by "
        "the version before: it takes other inputs, or too many wait"
    )


def _stuck(watch: _Watch) -> str | None:
    if watch.now is None or watch.now.oldest_s < _stuck_after(watch):
        return None
    return f"a request was not answered within {watch.now.oldest_s:.0f} s while the version was watched"


def _latency(watch: _Watch) -> str | None:
    seen, ratio = watch.report, watch.policy.latency_ratio
    needed = FEWEST_LATENCIES if seen.watched_s >= watch.policy.seconds else ENOUGH_LATENCIES
    if not ratio or seen.latency_p95_ms is None or seen.before_p95_ms is None or seen.requests < needed:
        return None
    allowed = max(seen.before_p95_ms * ratio, seen.before_p95_ms + SLACK_S * 1000)
    if seen.latency_p95_ms <= allowed:
        return None
    return (
        f"the 95th percentile of its latency is {seen.latency_p95_ms:.2f} ms over {seen.requests} requests, "
        f"{seen.latency_p95_ms / seen.before_p95_ms:.1f} times that of the version before on this device "
        f"({seen.before_p95_ms:.2f} ms); {ratio:g} times is allowed"
    )


def _memory(watch: _Watch) -> str | None:
    added, allowed = watch.report.memory_mb, watch.policy.memory_mb
    if allowed is None or added is None or added <= allowed:
        return None
    return f"it added {added:.0f} MiB to the inference worker, {allowed:.0f} MiB are allowed"


def _growth(watch: _Watch, now: float) -> str | None:
    """Memory that grows in every quarter of the time but the first, in which buffers find their size."""
    allowed, rss = watch.policy.growth_mb, watch.rss_mb
    if not allowed or len(rss) < GROWTH_SAMPLES:
        return None
    marks = [rss[(len(rss) - 1) * quarter // QUARTERS] for quarter in range(1, QUARTERS + 1)]
    steps = [after - before for before, after in pairwise(marks)]
    grown = marks[-1] - marks[0]
    if grown <= allowed or min(steps) < allowed / (2 * QUARTERS):
        return None
    return (
        f"the inference worker's memory did not stop growing: {grown:.0f} MiB in {now - watch.since:.0f} s, "
        f"{allowed:.0f} MiB are allowed"
    )


def fall_back(ran: str, why: str) -> str:
    """A sentence where another execution provider runs a version than was wanted first; empty otherwise.

    Args:
        ran: the provider that runs it.
        why: none wanted before that does; empty when the first wanted does.
    """
    return f"it runs on {ran}, because of {why}" if why else ""
