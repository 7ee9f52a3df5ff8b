"""Which chunk is sent when, and to whom: pure. A clock is passed in; nothing is read or sent here.

Devices say what they lack (`need`), and the server sends that, no faster than they take it. Needs are gathered for a
moment; a chunk that two or more devices lack is broadcast, one that a single device lacks is sent to it alone. No chunk
goes further than a window ahead of the slowest device that is not stalled. The state is only what devices have said in
the last seconds, so a server that starts again begins with nothing and loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from agent.protocol.messages import Need

GATHER_S = 0.3
STALLED_S = 1.0
FORGET_S = 120.0
RESEND_S = 1.5
BROADCAST_FROM = 2


@dataclass(frozen=True)
class Send:
    """One chunk to send: to one device, or to all that listen where `device_id` is None."""

    digest: str
    chunk: int
    device_id: str | None


@dataclass
class _Listener:
    missing: set[int]
    window: int
    heard_at: float


@dataclass
class _Stream:
    since: float
    listeners: dict[str, _Listener] = field(default_factory=dict)
    sent_at: dict[int, float] = field(default_factory=dict)


class Streamer:
    """Decides what to send."""

    def __init__(self) -> None:
        self._streams: dict[str, _Stream] = {}

    def hear(self, device_id: str, need: Need, now: float) -> None:
        """Take in what a device lacks; an empty `need` means it has all."""
        stream = self._streams.get(need.digest)
        if not need.missing:
            if stream is not None:
                stream.listeners.pop(device_id, None)
            return
        if stream is None:
            stream = self._streams[need.digest] = _Stream(since=now)
        missing = {chunk for span in need.missing for chunk in range(span.first, span.last + 1)}
        known = stream.listeners.get(device_id)
        if known is not None and known.missing == missing:
            # It lacks what it lacked: what was sent since then did not come, and is sent again.
            for chunk in missing:
                if now - stream.sent_at.get(chunk, now) > RESEND_S:
                    del stream.sent_at[chunk]
        stream.listeners[device_id] = _Listener(missing, need.window, now)

    def next(self, now: float, budget: int) -> Iterator[Send]:
        """What to send now, at most `budget` chunks."""
        for digest in list(self._streams):
            stream = self._streams[digest]
            for device_id in [one for one, state in stream.listeners.items() if now - state.heard_at > FORGET_S]:
                del stream.listeners[device_id]
            if not stream.listeners:
                del self._streams[digest]
                continue
            if now - stream.since < GATHER_S:
                continue
            for send in self._of_stream(digest, stream, now):
                if budget <= 0:
                    return
                budget -= 1
                stream.sent_at[send.chunk] = now
                yield send

    def _of_stream(self, digest: str, stream: _Stream, now: float) -> list[Send]:
        live = [one for one in stream.listeners.values() if now - one.heard_at <= STALLED_S]
        everyone = live or list(stream.listeners.values())
        limit = min(self._allowed(stream, listener, now) for listener in everyone)
        wanted = sorted({chunk for one in stream.listeners.values() for chunk in one.missing})
        sends: list[Send] = []
        for chunk in wanted:
            if len(sends) >= limit:
                break
            if now - stream.sent_at.get(chunk, -RESEND_S) < RESEND_S:
                continue
            lacking = [device_id for device_id, one in stream.listeners.items() if chunk in one.missing]
            if len(lacking) >= BROADCAST_FROM:
                sends.append(Send(digest, chunk, None))
            else:
                sends.append(Send(digest, chunk, lacking[0]))
        return sends

    @staticmethod
    def _allowed(stream: _Stream, listener: _Listener, now: float) -> int:
        """How many more chunks may be on their way to a device: its window less what was sent and not confirmed."""
        flying = sum(1 for chunk, at in stream.sent_at.items() if chunk in listener.missing and now - at < RESEND_S)
        return max(0, listener.window - flying)
