"""Requests that this device has no room for, asked of peers in its place: each of them once, and so many as may be.

What a request brings passes as it is: its body is not looked at, and its answer neither. Who asks this device waits no
longer than it said, and is told by this device that there is no room where no peer had any.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from dataclasses import dataclass
from urllib.parse import quote

from agent.client.http1 import Ask, Reply
from agent.protocol.datatypes import HEADER_LENGTH_READ
from agent.protocol.manifest import Manifest
from agent.serving.balancing import headers
from agent.serving.balancing.book import PeerBook
from agent.serving.balancing.links import Links, PeerTls
from agent.serving.exchange import HOPS, Answer, Request
from agent.serving.images import is_image

log = logging.getLogger("agent.balancing")
AT_ONCE = 64  # requests that are with peers
LONGEST_S = 60.0  # that a peer is waited for; less where the client said so
RUN_S = 30.0  # that an inference may take beyond the wait for its turn
SAID = ("content-type", HEADER_LENGTH_READ)  # of an answer, what the client needs to read it


@dataclass(frozen=True)
class Rules:
    """How requests are forwarded.

    Attributes:
        tries: how many peers are asked for one.
        any_variant: whether another variant of the same version may answer.
    """

    tries: int = 2
    any_variant: bool = False


class Forwarding:
    """Asks peers. Used by one event loop alone.

    Attributes:
        answered: by an artifact's digest, how many requests peers answered in its place.
        unanswered: by reason, how often a peer that was asked did not: `full`, `absent`, `failed`.
    """

    def __init__(self) -> None:
        self._book = PeerBook(random.Random())
        self._links = Links(None)
        self._rules = Rules()
        self._under_way = 0
        self.answered: Counter[str] = Counter()
        self.unanswered: Counter[str] = Counter()

    @property
    def peers(self) -> int:
        """How many there are."""
        return len(self._book)

    def told(self, places: tuple[str, ...], tls: PeerTls | None, rules: Rules) -> None:
        """Ask these from now on."""
        self._links.close()
        self._links, self._rules = Links(tls), rules
        self._book.set(places)

    def close(self) -> None:
        """End connections that are idle."""
        self._links.close()

    async def answer(self, request: Request, manifest: Manifest, timeout_s: float, waited_s: float) -> Answer | None:
        """A peer's answer to a request that this device has no room for; None where no peer gives one.

        Args:
            request: as it came.
            manifest: of what would have answered here.
            timeout_s: how long the request may wait for its turn, in seconds; 0 for as long as it takes.
            waited_s: how long it has waited, in seconds.
        """
        if self._under_way >= AT_ONCE or not len(self._book):
            return None
        loop = asyncio.get_running_loop()
        turn_by = loop.time() + timeout_s - waited_s if timeout_s else None
        until = loop.time() + LONGEST_S if turn_by is None else turn_by + RUN_S
        artifact = f"{manifest.model}@{manifest.version}" if self._rules.any_variant else manifest.digest
        asked: list[str] = []
        self._under_way += 1
        try:
            while len(asked) < self._rules.tries and (turn_by is None or loop.time() < turn_by):
                place = self._book.choose(artifact, loop.time(), asked)
                if place is None:
                    return None
                asked.append(place)
                left_s = None if turn_by is None else turn_by - loop.time()
                reply = await self._asked(place, artifact, self._ask(request, manifest, left_s), until)
                if reply is not None:
                    self.answered[manifest.digest] += 1
                    return _answer(reply, place)
        finally:
            self._under_way -= 1
        return None

    def _ask(self, request: Request, manifest: Manifest, left_s: float | None) -> Ask:
        said = {HOPS: "1"}
        if not self._rules.any_variant:
            said[headers.ARTIFACT] = manifest.digest
        if left_s is not None:
            said[headers.TIMEOUT_MS] = f"{max(1.0, left_s * 1000):.3f}"
        given = request.headers
        passed = [HEADER_LENGTH_READ]
        if is_image(given.get("content-type", "")):
            passed += ["content-type", "x-request-id"]
        said |= {name: given[name] for name in passed if name in given}
        path = f"/v2/models/{quote(manifest.model, safe='')}/versions/{quote(manifest.version, safe='')}/infer"
        return Ask("POST", path, [request.body], said)

    async def _asked(self, place: str, artifact: str, ask: Ask, until: float) -> Reply | None:
        """What a peer answered, where it did; what else it said is noted."""
        loop, book = asyncio.get_running_loop(), self._book
        book.asked(place)
        try:
            reply = await self._links.ask(place, ask, until)
        except OSError as error:
            log.info("the peer at %s was not reached: %s", place, str(error) or type(error).__name__)
            book.failed(place, loop.time())
            self.unanswered["failed"] += 1
            return None
        finally:
            book.over(place)
        now, load = loop.time(), headers.load_of(reply.headers)
        if reply.status == 200:
            book.answered(place, artifact, load, now)
            return reply
        if reply.status in {429, 503, 504}:
            book.full(place, artifact, load, now)
            self.unanswered["full"] += 1
        elif reply.status == 404:
            book.absent(place, artifact, now)
            self.unanswered["absent"] += 1
        else:
            log.info("the peer at %s %s", place, reply.said)
            book.answered(place, artifact, load, now)
            self.unanswered["failed"] += 1
        return None


def _answer(reply: Reply, place: str) -> Answer:
    said = {name.title(): reply.headers[name] for name in SAID if name in reply.headers}
    return Answer(200, bytes(reply.body), {**said, headers.ANSWERED_BY: place})
