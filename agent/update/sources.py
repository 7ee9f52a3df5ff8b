"""Which source a content is fetched from now: pure. The clock is passed in; nothing is opened or sent here.

Sources are asked in the configured order. One that fails rests, ever longer; one that does not have a content is asked
for it again later. What came is verified as a whole only, so when the whole is wrong every source but the server's own
MQTT that brought a part of it is barred from that content, and rests: the second try is the server's alone, and no lie
of a peer's or a stick's costs more than one more download.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from agent.source_config import SourceKind

MQTT_SILENT_S = 10.0  # without a new chunk, before what comes after MQTT in the order gets its turn
PAUSE_S = 5.0
LONGEST_PAUSE_S = 600.0
ABSENT_S = 30.0
LIED_S = 3600.0
REMEMBERED = 256  # sources and contents: beyond, the oldest are forgotten
KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class Place:
    """A source that may have a content: its name as it is reported, and what it is."""

    name: str
    kind: SourceKind


class Nearness(Enum):
    """Whether a content may be had without the server's link, which encodings are there to spare."""

    FAR = "far"
    PERHAPS = "perhaps"  # peers are asked first, and may have it
    HERE = "here"  # it lies in a bundle


@dataclass
class _Rest:
    until: float
    pause: float


class SourceBook:
    """What is known of the sources.

    Args:
        order: kinds, the first one preferred.
    """

    def __init__(self, order: Sequence[SourceKind]) -> None:
        self._rank = {kind: rank for rank, kind in enumerate(order)}
        self._rests: dict[str, _Rest] = {}
        self._absent: dict[tuple[str, str], float] = {}
        self._brought: dict[str, set[str]] = {}
        self._barred: dict[str, float] = {}

    def choose(self, digest: str, places: Sequence[Place], now: float, *, mqtt_silent_s: float | None) -> Place | None:
        """The source to use; None for MQTT.

        Args:
            digest: of the content.
            places: all but MQTT.
            now: a monotonic clock, in seconds.
            mqtt_silent_s: how long MQTT has brought nothing new; None when there is no connection.
        """
        if self._barred.get(digest, 0.0) > now:
            return None
        mqtt = self._rank[SourceKind.MQTT]
        silent = mqtt_silent_s is None or mqtt_silent_s >= MQTT_SILENT_S
        usable = [
            (self._rank[place.kind], number, place)
            for number, place in enumerate(places)
            if place.kind in self._rank and self._may_use(digest, place.name, now)
        ]
        best = min(usable, default=None)
        return best[2] if best is not None and (best[0] < mqtt or silent) else None

    def _may_use(self, digest: str, name: str, now: float) -> bool:
        rest = self._rests.get(name)
        return (rest is None or now >= rest.until) and now >= self._absent.get((digest, name), 0.0)

    def brought(self, digest: str, name: str) -> None:
        """A source brought a chunk that was wanted."""
        self._rests.pop(name, None)
        self._brought.setdefault(digest, set()).add(name)
        _bound(self._brought)

    def absent(self, digest: str, name: str, now: float) -> None:
        """A source does not have a content."""
        self._absent[digest, name] = now + ABSENT_S
        _bound(self._absent)

    def failed(self, name: str, now: float) -> None:
        """A source could not be reached, broke off, or answered nonsense."""
        known = self._rests.get(name)
        pause = min(known.pause * 2, LONGEST_PAUSE_S) if known else PAUSE_S
        self._rests[name] = _Rest(now + pause, pause)
        _bound(self._rests)

    def mismatched(self, digest: str, now: float) -> list[str]:
        """The whole was wrong: nobody but the server brings it now. Returns whom that is held against."""
        blamed = sorted(self._brought.pop(digest, ()))
        if blamed:
            self.bar(digest, now)
        for name in blamed:
            self._rests[name] = _Rest(now + LIED_S, LONGEST_PAUSE_S)
        _bound(self._rests)
        return blamed

    def bar(self, digest: str, now: float) -> None:
        """Let nobody but the server bring a content, for a while."""
        self._barred[digest] = now + LIED_S
        _bound(self._barred)

    def finished(self, digest: str) -> None:
        """A content is there, or is not wanted any more: who brought what of it does not matter any more."""
        self._brought.pop(digest, None)


def _bound(known: dict[KeyT, ValueT]) -> None:
    while len(known) > REMEMBERED:
        del known[next(iter(known))]
