"""Which rows of an inference request go to which devices, and when: least expected completion. Pure; no clock, no I/O.

A `Lane` is what takes parts: one device, or the devices of a route where a model is cut into stages. What is known of
lanes (`Speeds`) outlives a request. Rows are given out in parts of about `PART_S` of work, and smaller ones towards the
end, so that all lanes end together; each row's first right answer counts, and no other.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

PART_S = 0.25  # of work in a part
IN_FLIGHT = 2  # parts of a lane at once: while one is on its way, the other is worked off
PROBE_ROWS = 16  # at most, of the first parts of a lane of which nothing is known
PROBE_S = 5.0  # that such a part is expected to take
LATE = 3.0  # times what was expected, after which a part is given to another lane
LATE_S = 0.5  # and at least so much more, in seconds
LEAST_S = 0.03  # of work in a part, that sending it is worth
HALF_S = 1.0  # of a lane's work, after which what was known of its speed counts half
LEARNING = 0.4  # how much the newest answer counts for what the link takes
SLOWER = 3.0  # times what was expected, from which on an idle lane is taken to have become slower
PAUSE_S = 0.2  # of a lane that refuses and does not say for how long; doubled each time
LONGEST_PAUSE_S = 5.0
KEPT_SPEEDS = 20_000


@dataclass(frozen=True)
class Lane:
    """What takes parts.

    Attributes:
        id: names what is known of it: the same devices with the same model.
        devices: that a part passes, in their order; one for data sharding, one a stage for model sharding.
        in_flight: parts of it at once.
    """

    id: str
    devices: tuple[str, ...]
    in_flight: int = IN_FLIGHT


@dataclass(frozen=True)
class Speed:
    """What is known of a lane.

    Attributes:
        rows: that it answered lately, of which older ones count less.
        busy_s: seconds that it took for those.
        fixed_s: seconds of a part to a lane that has nothing to do, beyond those of its rows: the link, above all.
    """

    rows: float
    busy_s: float
    fixed_s: float = 0.0

    @property
    def row_s(self) -> float:
        """Seconds a row, while the lane is busy."""
        return max(self.busy_s, 1e-6) / self.rows


class Speeds:
    """What was learnt of lanes; may be kept for as long as the process lives."""

    def __init__(self) -> None:
        self._known: dict[str, Speed] = {}

    def of(self, lane: str) -> Speed | None:
        """What is known of a lane."""
        return self._known.get(lane)

    def learn(self, lane: str, rows: int, busy_s: float, *, idle: bool) -> None:
        """A part of so many rows kept the lane busy for so many seconds.

        Answers of parts that are worked off together come together: sums of rows and seconds bear that.

        Args:
            lane: which.
            rows: of the part.
            busy_s: since the answer before, or since it was sent.
            idle: whether the lane had nothing to do when it was sent: then `busy_s` has the link's time too.
        """
        before = self._known.get(lane)
        if before is None:
            if len(self._known) >= KEPT_SPEEDS:
                self._known.pop(next(iter(self._known)))
            self._known[lane] = Speed(rows, busy_s)
            return
        kept = 0.5 ** (busy_s / HALF_S)
        learnt = Speed(kept * before.rows + rows, kept * before.busy_s + busy_s, before.fixed_s)
        if idle:
            known_s = rows * before.row_s
            fixed_s = before.fixed_s + LEARNING * (max(0.0, busy_s - known_s) - before.fixed_s)
            if busy_s < known_s:  # it is faster than was thought, whatever the link takes of that
                learnt = Speed(rows, busy_s, fixed_s)
            elif busy_s <= SLOWER * (known_s + before.fixed_s):
                learnt = Speed(before.rows, before.busy_s, fixed_s)
        self._known[lane] = learnt


@dataclass(frozen=True)
class Sending:
    """A part to send now.

    Attributes:
        id: of this sending; its answer is told by it.
        lane: that takes it.
        first: its first row.
        last: the row after its last one.
        attempt: how often these rows were sent before.
    """

    id: int
    lane: Lane
    first: int
    last: int
    attempt: int


@dataclass
class _Part:
    first: int
    last: int
    attempts: int = 0
    done: bool = False
    sent: set[int] = field(default_factory=set)  # ids of what is under way

    @property
    def rows(self) -> int:
        return self.last - self.first


@dataclass
class _Sent:
    part: _Part
    state: _LaneState
    at: float
    expected_at: float
    late_at: float
    idle: bool  # whether its lane had nothing else to do
    given_up: bool = False


@dataclass
class _LaneState:
    lane: Lane
    under_way: dict[int, _Sent] = field(default_factory=dict)
    paused_until: float = 0.0
    pause_s: float = PAUSE_S
    answered_at: float = -math.inf
    out: str = ""  # why it is given nothing any more
    rows: int = 0  # that it answered first


@dataclass(frozen=True)
class LaneReport:
    """What a lane did for a request.

    Attributes:
        lane: which.
        rows: that its answers gave.
        out: why it was given no more; empty where it was not left out.
    """

    lane: Lane
    rows: int
    out: str


class Schedule:
    """One request.

    Args:
        rows: of it.
        lanes: that may answer them.
        speeds: what is known of lanes; it is learnt from here too.
        most_rows: of a part, so that a message holds it.

    Attributes:
        reissued: parts that were sent once more.
    """

    def __init__(self, rows: int, lanes: Sequence[Lane], speeds: Speeds, *, most_rows: int) -> None:
        self._rows = rows
        self._lanes = {one.id: _LaneState(one) for one in lanes}
        self._speeds = speeds
        self._most_rows = max(1, most_rows)
        self._fresh = 0  # the first row that was never given out
        self._again: dict[int, _Part] = {}  # by first row, parts that wait to be sent again
        self._open: dict[int, _Part] = {}  # by first row, parts that are not done
        self._sent: dict[int, _Sent] = {}
        self._ids = 0
        self._left = rows
        self.reissued = 0

    @property
    def done(self) -> bool:
        """Whether every row has its answer."""
        return self._left == 0

    @property
    def stuck(self) -> bool:
        """Whether no lane is left."""
        return not self.done and all(one.out for one in self._lanes.values())

    def add(self, lane: Lane) -> None:
        """A lane that may answer from now on; one that was left out begins anew."""
        before = self._lanes.get(lane.id)
        self._lanes[lane.id] = _LaneState(lane, rows=before.rows if before is not None else 0)

    def report(self) -> list[LaneReport]:
        """What each lane did."""
        return [LaneReport(one.lane, one.rows, one.out) for one in self._lanes.values()]

    def send(self, now: float) -> list[Sending]:
        """What to send now. Parts that are late are given out again."""
        self._give_up_late(now)
        for one in self._lanes.values():
            if one.paused_until <= now:
                one.paused_until = 0.0
        found = []
        passed: set[str] = set()
        while (state := self._best(now, passed)) is not None:
            part = self._part_for(state, now)
            if part is None:
                passed.add(state.lane.id)
            else:
                found.append(self._give(state, part, now))
        return found

    def wake_at(self) -> float:
        """When to call `send` again though nothing was heard; infinite where that changes nothing."""
        late = (one.late_at for one in self._sent.values() if not one.given_up)
        waits = self._waiting > 0
        paused = (one.paused_until for one in self._lanes.values() if waits and not one.out and one.paused_until > 0)
        return min((*late, *paused), default=math.inf)

    def take(self, sending: int, now: float) -> tuple[int, int] | None:
        """A right answer came: its rows, from the first up to and without the last; None: not needed any more."""
        sent = self._sent.pop(sending, None)
        if sent is None:
            return None
        state, part = sent.state, sent.part
        state.under_way.pop(sending, None)
        part.sent.discard(sending)
        busy = now - max(sent.at, state.answered_at)
        state.answered_at, state.pause_s, state.paused_until = now, PAUSE_S, 0.0
        self._speeds.learn(state.lane.id, part.rows, busy, idle=sent.idle)
        if part.done:
            return None
        part.done = True
        del self._open[part.first]
        self._again.pop(part.first, None)
        self._left -= part.rows
        state.rows += part.rows
        return part.first, part.last

    def refuse(self, sending: int, now: float, retry_s: float = 0.0) -> None:
        """A lane has too much to do: it is asked again when it says, and its part goes to whom has time."""
        sent = self._end(sending)
        if sent is None:
            return
        state = sent.state
        pause = min(max(retry_s, state.pause_s), max(LONGEST_PAUSE_S, retry_s))
        state.paused_until, state.pause_s = now + pause, min(2 * state.pause_s, LONGEST_PAUSE_S)

    def divide(self, sending: int) -> bool:
        """A part was too large: its rows are sent in halves; False where it is one row."""
        sent = self._sent.get(sending)
        if sent is None or sent.part.done:
            self._end(sending)
            return True
        part = sent.part
        if part.rows == 1:
            return False
        self._most_rows = min(self._most_rows, math.ceil(part.rows / 2))
        for one in list(part.sent):
            self._drop(one)
        part.done = True  # no answer to it counts any more
        middle = part.first + part.rows // 2
        for first, last in ((part.first, middle), (middle, part.last)):
            half = self._open[first] = _Part(first, last, part.attempts)
            self._wait(half)
        return True

    def leave_out(self, lane_id: str, why: str) -> None:
        """A lane failed, or answered what is no answer: it gets nothing more, and others get what it had."""
        state = self._lanes[lane_id]
        if not state.out:
            state.out = why
            for sending in list(state.under_way):
                self._end(sending)
        # What it was late with counts no more either.
        for sending in [one for one, sent in self._sent.items() if sent.state is state]:
            self._drop(sending)

    def gone(self, device_id: str) -> None:
        """A device is offline: lanes that pass it are left out."""
        for state in list(self._lanes.values()):
            if device_id in state.lane.devices and not state.out:
                self.leave_out(state.lane.id, f"{device_id} went offline")

    def lane_of(self, sending: int) -> Lane | None:
        """Which lane was sent this, while its answer may count."""
        sent = self._sent.get(sending)
        return sent.state.lane if sent is not None else None

    def rows_of(self, sending: int) -> int:
        """How many rows an answer must have; 0 where none is waited for."""
        sent = self._sent.get(sending)
        return sent.part.rows if sent is not None else 0

    # -- what goes where

    @property
    def _waiting(self) -> int:
        """Rows that nobody works on."""
        return self._rows - self._fresh + sum(part.rows for part in self._again.values())

    def _best(self, now: float, passed: Container[str]) -> _LaneState | None:
        """The lane that would have a further part done first, of those that may take one."""
        free = [
            one
            for one in self._lanes.values()
            if not one.out
            and one.lane.id not in passed
            and one.paused_until <= now
            and len(one.under_way) < one.lane.in_flight
        ]
        return min(free, key=lambda one: (self._done_s(one, 1, now), one.rows), default=None)

    def _part_for(self, state: _LaneState, now: float) -> _Part | None:
        if self._again:
            return self._again.pop(min(self._again))
        if self._fresh == self._rows:
            return self._straggler(state, now)
        rows = self._rows_for(state, now)
        if rows == 0:
            return None
        part = self._open[self._fresh] = _Part(self._fresh, min(self._rows, self._fresh + rows))
        self._fresh = part.last
        return part

    def _rows_for(self, state: _LaneState, now: float) -> int:
        """As many rows as are `PART_S` of work, fewer towards the end; none where other lanes are done sooner."""
        known = self._speeds.of(state.lane.id)
        left = self._rows - self._fresh
        if known is None:
            return max(1, min(PROBE_ROWS, self._most_rows, left // (8 * len(self._lanes))))
        share_s = self._fair_s(left, now) - max(self._queue_s(state, now), known.fixed_s)
        busy = any(one.under_way for one in self._lanes.values())
        if busy and share_s < known.row_s / 2 and share_s < LEAST_S:
            return 0
        wanted = min(PART_S, max(share_s / 2, LEAST_S)) / known.row_s
        return max(1, min(self._most_rows, round(wanted)))

    def _fair_s(self, left: int, now: float) -> float:
        """In how many seconds all lanes would have so many rows done, each beginning when it is free."""
        usable = [one for one in self._lanes.values() if not one.out]
        queues = sorted((self._done_s(one, 0, now), self._row_s(one)) for one in usable)
        rate = begun = 0.0
        for number, (queue_s, row_s) in enumerate(queues):
            rate += 1 / row_s
            begun += queue_s / row_s
            fair = (left + begun) / rate
            if number + 1 == len(queues) or fair <= queues[number + 1][0]:
                return fair
        return 0.0

    def _straggler(self, state: _LaneState, now: float) -> _Part | None:
        """The part that would be done soonest by this lane instead, of those that others are still at."""
        mine = {id(sent.part) for sent in state.under_way.values()}
        best, gain = None, 0.0
        for part in self._open.values():
            if len(part.sent) != 1 or id(part) in mine:
                continue
            other = self._sent[next(iter(part.sent))]
            here = self._done_s(state, part.rows, now)
            overdue = now - other.expected_at
            there = -overdue if overdue < 0 else overdue + self._row_s(other.state) * part.rows
            if there - here > gain and there > 1.5 * here:
                best, gain = part, there - here
        return best

    def _give(self, state: _LaneState, part: _Part, now: float) -> Sending:
        expected = self._done_s(state, part.rows, now)
        late_at = now + LATE * expected + LATE_S
        sent = _Sent(part, state, now, now + expected, late_at, idle=not state.under_way)
        self._ids += 1
        if part.attempts:
            self.reissued += 1
        sending = Sending(self._ids, state.lane, part.first, part.last, part.attempts)
        part.attempts += 1
        part.sent.add(self._ids)
        self._sent[self._ids] = state.under_way[self._ids] = sent
        return sending

    def _row_s(self, state: _LaneState) -> float:
        known = self._speeds.of(state.lane.id)
        return known.row_s if known is not None else PROBE_S / PROBE_ROWS

    def _done_s(self, state: _LaneState, rows: int, now: float) -> float:
        """In how many seconds a lane would have so many rows more done: while it is busy the link costs nothing."""
        known = self._speeds.of(state.lane.id)
        queue_s = self._queue_s(state, now)
        if known is None:
            return queue_s + (PROBE_S if rows else 0.0)
        return max(queue_s, known.fixed_s) + rows * known.row_s

    def _queue_s(self, state: _LaneState, now: float) -> float:
        """What a lane still has to do."""
        return max((sent.expected_at - now for sent in state.under_way.values()), default=0.0)

    # -- what is over

    def _give_up_late(self, now: float) -> None:
        for sending, sent in list(self._sent.items()):
            if sent.given_up or now < sent.late_at:
                continue
            state = sent.state
            sent.given_up = True  # an answer may come yet, and counts if it is the first
            state.under_way.pop(sending, None)
            sent.part.sent.discard(sending)
            state.paused_until = max(state.paused_until, now + state.pause_s)
            state.pause_s = min(2 * state.pause_s, LONGEST_PAUSE_S)
            self._wait(sent.part)

    def _end(self, sending: int) -> _Sent | None:
        sent = self._drop(sending)
        if sent is not None and not sent.given_up:
            self._wait(sent.part)
        return sent

    def _drop(self, sending: int) -> _Sent | None:
        sent = self._sent.pop(sending, None)
        if sent is not None:
            sent.state.under_way.pop(sending, None)
            sent.part.sent.discard(sending)
        return sent

    def _wait(self, part: _Part) -> None:
        """It is to be sent again, unless another lane has it."""
        if not part.done and not part.sent:
            self._again[part.first] = part
