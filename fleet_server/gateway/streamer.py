"""Which chunk is sent when, and to whom: pure. A clock is passed in; nothing is read or sent here.

Devices say what they lack (`need`), and the server sends that, no faster than they take it. All devices that want the
same content share one stream, which goes round: who joins late takes what is being sent, and gets the rest in the next
round. What was lost is gathered for a moment, then repaired: for many by a broadcast, for several at once by a
combination of chunks, else for the one device. No chunk goes further than a window ahead of the slowest device that is
not stalled. The state is only what devices have said in the last seconds, so a server that starts again begins with
nothing and loses nothing. Sets of chunks are bitmaps, and each call goes over the devices once, however many chunks it
sends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from agent.protocol.limits import LIMITS
from agent.protocol.messages import Need
from fleet_server.gateway import bitmaps
from fleet_server.gateway.repairs import Group, group

GATHER_S = 0.3
QUIET_S = 0.05  # when nobody has joined for so long, a stream begins before that
STALLED_S = 1.0
FORGET_S = 60.0
RESEND_S = 1.5  # while it is not known how long a chunk takes to be confirmed
SHORTEST_RESEND_S = 0.8
LONGEST_RESEND_S = 60.0
LOST_S = 15.0  # nothing is held lost before that, unless something sent later came
REPAIR_EVERY_S = 1.0  # while a round goes on; more are mended together the longer they are gathered
BROADCAST_FROM = 3
SMALL_WAVE = 4  # in one of so few devices two are enough
STALLED_CHUNKS = 1024  # that the broker may have to keep for all stalled devices together
Moment = tuple[float, int]  # when something was sent, and the how manieth it was: a clock can't tell two apart


@dataclass(frozen=True)
class Send:
    """One message: a chunk, or the exclusive-or of several; to one device, or to all that listen for None."""

    digest: str
    chunks: tuple[int, ...]
    device_id: str | None


@dataclass
class _Listener:
    """A device as its last word described it, and what was sent to it since.

    Attributes:
        missing: what it lacks.
        flying: of that, what was sent and is not known to be lost.
        alone: it takes no broadcasts.
        sent_at: when what was sent otherwise than by a plain broadcast was sent, by chunk.
        newest: of the chunks that it is known to have, when the last one was sent.
        resent: what was sent to it more than once: should it come, nobody can tell which of the two came.
        got_at: when it last said that it had got something.
        overtaken: chunks that something sent later has overtaken, and when that was found out.
        delay: how long chunks take until they are confirmed, in seconds; the worst of late.
        probed: what was sent again only to see whether the device is there, and when it was first sent.
    """

    missing: int
    window: int
    heard_at: float
    rest_until: float
    alone: bool
    flying: int = 0
    sent_at: dict[int, Moment] = field(default_factory=dict)
    newest: Moment = (float("-inf"), 0)
    resent: int = 0
    got_at: float = float("-inf")
    overtaken: dict[int, float] = field(default_factory=dict)
    delay: float | None = None
    probed: dict[int, Moment] = field(default_factory=dict)

    @property
    def wanted(self) -> int:
        return self.missing & ~self.flying

    def occupied(self, held: int) -> int:
        return (self.flying | self.missing & held).bit_count()

    @property
    def resend_s(self) -> float:
        if self.delay is not None:
            return max(SHORTEST_RESEND_S, 3 * self.delay)
        return float(min(RESEND_S * 2 ** len(self.probed), LONGEST_RESEND_S))

    def stalled(self, now: float) -> bool:
        return now - max(self.heard_at, self.rest_until) > STALLED_S


@dataclass
class _Stream:
    """One content.

    Attributes:
        at: where the round is: the next chunk.
        sent_at: when chunks were last broadcast.
        sent: how many messages there were.
        lost: chunks that somebody lost, to be repaired.
        lost_since: when the first of them was found out.
    """

    since: float
    joined_at: float = 0.0
    listeners: dict[str, _Listener] = field(default_factory=dict)
    at: int = 0
    sent_at: dict[int, Moment] = field(default_factory=dict)
    sent: int = 0
    lost: int = 0
    lost_since: float = 0.0

    def gathered(self, now: float) -> bool:
        return now - self.since >= GATHER_S or now - self.joined_at >= QUIET_S


class Streamer:
    """Decides what to send."""

    def __init__(self) -> None:
        self._streams: dict[str, _Stream] = {}

    def hear(self, device_id: str, need: Need, now: float) -> None:
        """Take in what a device lacks; an empty `need` means it has all, or wants no more now."""
        stream = self._streams.get(need.digest)
        if not need.missing:
            if stream is not None:
                stream.listeners.pop(device_id, None)
            return
        if stream is None:
            stream = self._streams[need.digest] = _Stream(since=now)
        missing = bitmaps.from_ranges(need.missing)
        listener = stream.listeners.get(device_id)
        if listener is None:
            stream.joined_at = now
            listener = stream.listeners[device_id] = _Listener(missing, need.window, now, now, need.alone)
        elif len(need.missing) == LIMITS.missing_ranges:
            above = need.missing[-1].last + 1  # it may lack more than it could say
            missing |= listener.missing >> above << above
        got, sent = listener.missing & ~missing, listener.flying
        listener.missing, listener.flying = missing, listener.flying & missing
        if need.anew:
            listener.probed.clear()
            _lose(stream, listener, listener.flying, now)
            listener.resent = 0
        listener.window, listener.alone = need.window, need.alone
        listener.heard_at, listener.rest_until = now, now + need.rest_s
        if got:
            listener.got_at = now
            _note_confirmed(stream, listener, got & sent, now)
        _note_lost(stream, listener, now)

    @property
    def idle(self) -> bool:
        """Whether nobody lacks anything."""
        return not self._streams

    def forget(self, device_id: str) -> None:
        """A device is gone; when it is back it says what it lacks."""
        for stream in self._streams.values():
            stream.listeners.pop(device_id, None)

    def keep(self, wanted: Callable[[str], bool]) -> None:
        """Forget the streams of other contents."""
        self._streams = {digest: stream for digest, stream in self._streams.items() if wanted(digest)}

    def next(self, now: float, budget: int) -> Iterator[Send]:
        """What to send now, at most `budget` messages."""
        for digest in list(self._streams):
            stream = self._streams.pop(digest)
            for device_id in [
                one for one, state in stream.listeners.items() if now - max(state.heard_at, state.rest_until) > FORGET_S
            ]:
                del stream.listeners[device_id]
            if not stream.listeners:
                continue
            self._streams[digest] = stream  # at the end: streams are served in turns
            if stream.gathered(now) and budget > 0:
                for send in _Round(digest, stream, now).sends(budget):
                    budget -= 1
                    yield send


class _Round:
    """One look at a stream: what it is to send at this moment."""

    def __init__(self, digest: str, stream: _Stream, now: float) -> None:
        self._digest = digest
        self._stream = stream
        self._now = now
        self._shared = {key: one for key, one in stream.listeners.items() if not one.alone}
        self._broadcast_from = 2 if len(self._shared) <= SMALL_WAVE else BROADCAST_FROM

    def sends(self, budget: int) -> list[Send]:
        found: list[Send] = []
        if self._shared:
            some, many = self._count()
            if self._stream.lost:
                found += self._repair(some, many, min(budget, self._room(0)))
                some, many = self._count() if found else (some, many)
            found += self._go_on(some, many, min(budget - len(found), self._room(self._stream.lost)))
        for device_id, listener in self._stream.listeners.items():
            if listener.alone and len(found) < budget:
                found += self._send_alone(device_id, listener, budget - len(found))
        return found

    def _count(self) -> tuple[int, int]:
        """Chunks that at least one device waits for, and those that enough of them wait for to broadcast them."""
        one = two = three = 0
        for listener in self._shared.values():
            wanted = listener.missing & ~listener.flying
            three |= two & wanted
            two |= one & wanted
            one |= wanted
        return one, (two if self._broadcast_from == 2 else three)

    def _room(self, held: int) -> int:
        """How many more chunks may be on their way to all that listen, when room is held for repairs of some."""
        live: list[_Listener] = []
        stalled: list[_Listener] = []
        for listener in self._shared.values():
            (stalled if listener.stalled(self._now) else live).append(listener)
        ahead = STALLED_CHUNKS // len(stalled) if live and stalled else 0
        rooms = [one.window - one.occupied(held) for one in live if one.missing != one.flying]
        rooms += [max(one.window, ahead) - one.occupied(held) for one in stalled]
        return max(0, min(rooms, default=0))

    def _go_on(self, some: int, many: int, budget: int) -> list[Send]:
        stream = self._stream
        batch = bitmaps.first_from(some & ~stream.lost, stream.at, budget)
        if not batch:
            return []
        shared = batch & many
        if shared:
            self._note_broadcast(shared)
        single = self._lackers(batch & ~shared)
        sends: list[Send] = []
        low = batch & ((1 << stream.at) - 1)
        for part in (batch ^ low, low):
            for chunk in bitmaps.members(part):
                if shared >> chunk & 1:
                    sends.append(Send(self._digest, (chunk,), None))
                else:
                    sends += [self._to_one(device_id, chunk) for device_id in single[chunk]]
                stream.at = chunk + 1
        return sends

    def _repair(self, some: int, many: int, budget: int) -> list[Send]:
        stream, waited = self._stream, self._now - self._stream.lost_since
        lost = stream.lost & some
        if not lost:
            stream.lost = 0
            return []
        goes_on = many & ~stream.lost
        if waited < (REPAIR_EVERY_S if goes_on else GATHER_S):
            return []
        sends: list[Send] = []
        mended = 0
        lackers = self._lackers(lost)
        missing = {key: self._shared[key].missing for devices in lackers.values() for key in devices}
        for one in group({chunk: set(devices) for chunk, devices in lackers.items()}, missing):
            if len(sends) >= budget:
                break
            sends += self._mend(one)
            for chunk in one.chunks:
                mended |= 1 << chunk
        stream.lost &= ~mended
        return sends

    def _mend(self, found: Group) -> list[Send]:
        if len(found.mends) < self._broadcast_from:
            return [self._to_one(device_id, chunk) for device_id, chunk in found.mends.items()]
        if len(found.chunks) == 1:
            self._note_broadcast(1 << found.chunks[0])
        else:
            for device_id, chunk in found.mends.items():
                self._note_sent(self._shared[device_id], chunk)
        return [Send(self._digest, tuple(sorted(found.chunks)), None)]

    def _send_alone(self, device_id: str, listener: _Listener, budget: int) -> list[Send]:
        room = min(budget, listener.window - listener.flying.bit_count())
        batch = bitmaps.first_from(listener.wanted, 0, room)
        return [self._to_one(device_id, chunk) for chunk in bitmaps.members(batch)]

    def _lackers(self, chunks: int) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        if chunks:
            for device_id, listener in self._shared.items():
                for chunk in bitmaps.members(listener.wanted & chunks):
                    found.setdefault(chunk, []).append(device_id)
        return found

    def _note_broadcast(self, chunks: int) -> None:
        if not chunks:
            return
        for listener in self._shared.values():
            sent = listener.missing & chunks
            if sent:
                listener.flying |= sent
                for chunk in bitmaps.members(sent) if listener.sent_at else ():
                    listener.sent_at.pop(chunk, None)
        for chunk in bitmaps.members(chunks):
            self._stream.sent_at[chunk] = self._moment()

    def _to_one(self, device_id: str, chunk: int) -> Send:
        self._note_sent(self._stream.listeners[device_id], chunk)
        return Send(self._digest, (chunk,), device_id)

    def _note_sent(self, listener: _Listener, chunk: int) -> None:
        listener.flying |= 1 << chunk
        listener.sent_at[chunk] = self._moment()

    def _moment(self) -> Moment:
        self._stream.sent += 1
        return self._now, self._stream.sent


def _sent_at(stream: _Stream, listener: _Listener, chunk: int, now: float) -> Moment:
    return listener.probed.get(chunk) or listener.sent_at.get(chunk) or stream.sent_at.get(chunk) or (now, 0)


def _note_confirmed(stream: _Stream, listener: _Listener, got: int, now: float) -> None:
    """A device got chunks that were sent: it is there, and this is how long they took."""
    times = [_sent_at(stream, listener, chunk, now) for chunk in bitmaps.members(got & ~listener.resent)]
    listener.resent &= ~got
    for chunk in bitmaps.members(got) if listener.sent_at or listener.probed else ():
        listener.sent_at.pop(chunk, None)
        listener.probed.pop(chunk, None)
    if times:
        listener.newest = max(listener.newest, *times)
        took = now - max(times)[0]
        listener.delay = took if listener.delay is None else max(took, 0.875 * listener.delay + 0.125 * took)


def _note_lost(stream: _Stream, listener: _Listener, now: float) -> None:
    """What was sent before something that arrived, and is not there soon, is lost: connections keep the order.

    Where nothing comes any more, so is what takes far longer than others did; what merely takes longer is tried again
    one at a time, and ever more rarely while it is not known how long chunks take: a slow or busy device must not be
    sent again what still waits for it.
    """
    lost, oldest, resend_s = 0, -1, listener.resend_s
    for chunk in bitmaps.members(listener.flying):
        at = _sent_at(stream, listener, chunk, now)
        if at < listener.newest:
            if now - listener.overtaken.setdefault(chunk, now) >= GATHER_S:
                lost |= 1 << chunk
            continue
        quiet_s = now - max(at[0], listener.got_at)
        if listener.delay is not None and quiet_s >= max(LOST_S, 2 * resend_s):
            lost |= 1 << chunk
        elif quiet_s >= resend_s and chunk not in listener.probed and oldest < 0:
            oldest = chunk
    if oldest >= 0:
        lost |= 1 << oldest
        listener.probed[oldest] = _sent_at(stream, listener, oldest, now)
    _lose(stream, listener, lost, now)


def _lose(stream: _Stream, listener: _Listener, lost: int, now: float) -> None:
    listener.flying &= ~lost
    listener.resent |= lost
    if listener.overtaken:
        listener.overtaken = {chunk: at for chunk, at in listener.overtaken.items() if listener.flying >> chunk & 1}
    if lost and not listener.alone:
        if not stream.lost:
            stream.lost_since = now
        stream.lost |= lost
