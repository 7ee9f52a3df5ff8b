"""Which peer is asked for a request that this device has no room for. Pure: no clock, no network.

Of two peers that are picked by chance the one is asked that is expected to answer sooner (the power of two choices):
many devices that know the same old news of a third do not all go there. What is known of a peer is what it said with
its last answers; nobody is ever asked how it is, and nobody waits to learn it.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

AT_ONCE = 16  # requests that are with one peer
SHORTEST_REST_S, LONGEST_REST_S = 0.02, 1.0  # of one that was full
FAILED_S, FAILED_MOST_S = 0.5, 30.0  # of one that could not be asked; doubled each time
ABSENT_S = 5.0  # before one that does not serve an artifact is asked for it again
UNKNOWN_S = 0.01  # what an inference is taken to cost where nothing is known
KNOWN_MOST = 64  # artifacts that are kept of one peer


@dataclass(frozen=True)
class Load:
    """What a peer says of one model.

    Attributes:
        queue_s: how long what waits there will take, in seconds.
        infer_s: how long one inference takes, in seconds.
    """

    queue_s: float
    infer_s: float


@dataclass
class _Known:
    load: Load
    at: float
    absent_until: float = 0.0


@dataclass
class _Peer:
    asked: int = 0
    failures: int = 0
    rests_until: float = 0.0
    artifacts: dict[str, _Known] = field(default_factory=dict)

    def usable(self, artifact: str, now: float) -> bool:
        known = self.artifacts.get(artifact)
        absent = known is not None and now < known.absent_until
        return not absent and now >= self.rests_until and self.asked < AT_ONCE

    def expected_s(self, artifact: str, now: float) -> float:
        """When it would have answered one more request; what waits there is worked off meanwhile."""
        known = self.artifacts.get(artifact)
        if known is None:
            return (self.asked + 1) * UNKNOWN_S
        return max(0.0, known.load.queue_s - (now - known.at)) + (self.asked + 1) * known.load.infer_s


class PeerBook:
    """The peers of a device. Times are seconds of a clock that is never set.

    Args:
        chance: picks two of many.
    """

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._peers: dict[str, _Peer] = {}

    def __len__(self) -> int:
        return len(self._peers)

    def set(self, places: Iterable[str]) -> None:
        """There are these peers from now on; what is known of those that stay is kept."""
        self._peers = {place: self._peers.get(place) or _Peer() for place in places}

    def choose(self, artifact: str, now: float, without: Collection[str] = ()) -> str | None:
        """The peer to ask for an artifact; None where none may be asked now.

        Args:
            artifact: its digest, or another name of what is asked for.
            now: the time.
            without: those that have been asked.
        """
        usable = [place for place, one in self._peers.items() if place not in without and one.usable(artifact, now)]
        two = self._chance.sample(usable, min(2, len(usable)))
        return min(two, key=lambda place: self._peers[place].expected_s(artifact, now), default=None)

    def asked(self, place: str) -> None:
        """A request goes to it."""
        if place in self._peers:
            self._peers[place].asked += 1

    def over(self, place: str) -> None:
        """That request has come to an end, whatever became of it."""
        peer = self._peers.get(place)
        if peer is not None and peer.asked:
            peer.asked -= 1

    def answered(self, place: str, artifact: str, load: Load | None, now: float) -> None:
        """It answered, and said how it is."""
        peer = self._peers.get(place)
        if peer is None:
            return
        peer.failures = 0
        if load is not None:
            _keep(peer, artifact, _Known(load, now))

    def full(self, place: str, artifact: str, load: Load | None, now: float) -> None:
        """It has enough to do: it rests until that is worked off."""
        self.answered(place, artifact, load, now)
        peer = self._peers.get(place)
        if peer is not None:
            rest_s = LONGEST_REST_S if load is None else load.queue_s
            peer.rests_until = now + min(max(rest_s, SHORTEST_REST_S), LONGEST_REST_S)

    def absent(self, place: str, artifact: str, now: float) -> None:
        """It does not serve that artifact."""
        peer = self._peers.get(place)
        if peer is not None:
            _keep(peer, artifact, _Known(Load(0.0, UNKNOWN_S), now, now + ABSENT_S))

    def failed(self, place: str, now: float) -> None:
        """It could not be asked, or what it said made no sense. Requests that fail together count once."""
        peer = self._peers.get(place)
        if peer is not None and now >= peer.rests_until:
            peer.rests_until = now + min(FAILED_S * 2.0 ** min(peer.failures, 16), FAILED_MOST_S)
            peer.failures += 1


def _keep(peer: _Peer, artifact: str, known: _Known) -> None:
    peer.artifacts.pop(artifact, None)
    peer.artifacts[artifact] = known
    if len(peer.artifacts) > KNOWN_MOST:
        del peer.artifacts[next(iter(peer.artifacts))]
