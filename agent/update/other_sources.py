"""Fetches from other sources than MQTT what the fetcher wants: sticks, peers, mirrors, and the fleet server by HTTPS.

It has no thread but those of transfers, at most one a content: the fetcher asks on every tick whether one of them
brings a content now. Which one, `agent.update.sources` decides.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol
from urllib.parse import urlsplit
from zlib import crc32

from agent.config import Config
from agent.errors import IdentityError
from agent.protocol.limits import LIMITS
from agent.protocol.manifest import Content
from agent.protocol.messages import ChunkRange, SourceNeed, SourceOffer
from agent.protocol.topics import DEVICE_HOST, PEER_PATH
from agent.source_config import SourceKind, is_loopback, split_place
from agent.update.bundle_file import Bundle, read_chunks
from agent.update.download import DownloadProgress
from agent.update.source_tls import Credentials
from agent.update.sources import MQTT_SILENT_S, Nearness, Place, SourceBook
from agent.update.transfer import Address, Reader, SourceChunk, SourceError, Transfer, TransferEnded

log = logging.getLogger("agent.sources")
FIRST_S = 2.0  # for its first chunk MQTT waits so long; then both go on until it comes
STUCK_S = 90.0  # without a chunk: longer than any wait of a transfer's own
ASK_AGAIN_S = 10.0
NO_OFFER_S = 600.0
SPARE_S = 60.0  # before a ticket ends, another is asked for
FOUND_PEERS = 32


class Connection(Protocol):
    """What is needed of the link."""

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted the connection."""
        ...


@dataclass
class _Running:
    digest: str
    place: Place
    transfer: Transfer
    last_at: float
    came: bool = False


@dataclass
class _Offer:
    """What the server said of a content, and when to ask anew."""

    offer: SourceOffer | None
    ask_at: float


class OtherSources:
    """The sources of this device but MQTT.

    Args:
        config: which there are.
        link: whether MQTT is there.
        put: takes what transfers bring; called from their threads.
        say_need: asks the server where else a content is.
        credentials: for TLS.
    """

    def __init__(
        self,
        config: Config,
        link: Connection,
        put: Callable[[SourceChunk | TransferEnded], None],
        say_need: Callable[[SourceNeed], None],
        credentials: Credentials,
    ) -> None:
        self._config = config.sources
        self._device_id = config.device_id
        self._link = link
        self._put = put
        self._say_need = say_need
        self._credentials = credentials
        self._book = SourceBook(config.sources.order)
        self._running: dict[str, _Running] = {}
        self._offers: dict[str, _Offer] = {}
        self._peers: dict[str, str] = {}
        self._bundles: tuple[Bundle, ...] = ()

    # -- what there is

    def see_bundles(self, bundles: tuple[Bundle, ...]) -> None:
        """These are the bundles from now on."""
        self._bundles = bundles

    def see_peer(self, name: str, place: str | None) -> None:
        """A peer was found on the LAN at `host:port`, or has gone."""
        if place is None:
            self._peers.pop(name, None)
        elif name in self._peers or len(self._peers) < FOUND_PEERS:
            self._peers[name] = place

    def offered(self, offer: SourceOffer, now: float) -> None:
        """The server's answer to where else a content is."""
        known = self._offers.get(offer.digest)
        if known is None:
            return
        if not offer.url:
            known.offer, known.ask_at = None, now + NO_OFFER_S
        else:
            known.offer, known.ask_at = offer, now + max(ASK_AGAIN_S, offer.expires_in_s - SPARE_S)

    # -- what is wanted

    def brings(self, progress: DownloadProgress, now: float, may_use: Callable[[SourceKind], bool]) -> bool:
        """Whether another source than MQTT brings a content now; one that may is set to work.

        Args:
            progress: of the download.
            now: a monotonic clock, in seconds.
            may_use: whether a kind of source may be used now.
        """
        content = progress.part.content
        running = self._running.get(content.digest)
        if running is not None:
            allowed, stuck = may_use(running.place.kind), now - running.last_at > STUCK_S
            if allowed and not stuck:
                return running.came or now - running.last_at <= FIRST_S
            self._end(running)
            if allowed:
                log.warning("%s: nothing came for %.0f s", running.place.name, STUCK_S)
                self._book.failed(running.place.name, now)
        silent_s = progress.silent_s(now) if self._link.connected and may_use(SourceKind.MQTT) else None
        places = self._places(content, now, silent_s)
        usable = [place for place in places if may_use(place.kind)]
        place = self._book.choose(content.digest, usable, now, mqtt_silent_s=silent_s)
        if place is None:
            return False
        try:
            where = places[place]()
        except (SourceError, IdentityError, OSError) as error:
            log.warning("%s: %s", place.name, error)
            self._book.failed(place.name, now)
            return False
        log.info("fetching %s from %s", content.digest[:12], place.name)
        reader = _reader(where, content, progress.part.missing_ranges(LIMITS.missing_ranges))
        self._running[content.digest] = _Running(content.digest, place, Transfer(reader, self._put), now)
        return True

    def nearness(self, digest: str) -> Nearness:
        """Whether a content may be had without the server's link."""
        order = self._config.order
        if SourceKind.USB in order and any(digest in bundle.artifacts for bundle in self._bundles):
            return Nearness.HERE
        first = order[: order.index(SourceKind.MQTT)] if SourceKind.MQTT in order else order
        asked = SourceKind.PEER in first and (self._config.peers or self._peers)
        return Nearness.PERHAPS if asked else Nearness.FAR

    def bar(self, digest: str, now: float) -> None:
        """Let nobody but the server's MQTT bring a content."""
        self._book.bar(digest, now)

    def took(self, chunk: SourceChunk, now: float) -> tuple[str, str] | None:
        """Whose a chunk of a transfer is: digest and the source's name; None when it is not wanted any more."""
        running = self._by_number(chunk.transfer)
        if running is None:
            return None
        running.transfer.taken()
        running.last_at, running.came = now, True
        return running.digest, running.place.name

    def brought(self, digest: str, name: str) -> None:
        """A chunk of it was one that was missing."""
        self._book.brought(digest, name)

    def ended(self, end: TransferEnded, now: float) -> None:
        """A transfer is over."""
        running = self._by_number(end.transfer)
        if running is None:
            return
        del self._running[running.digest]
        if end.error is None:
            return
        log.log(logging.DEBUG if end.error.absent else logging.WARNING, "%s: %s", running.place.name, end.error)
        if running.place.kind is SourceKind.HTTPS:
            self._offers.pop(running.digest, None)  # the ticket may be why
        if end.error.absent:
            self._book.absent(running.digest, running.place.name, now)
        else:
            self._book.failed(running.place.name, now)

    def finished(self, digest: str, now: float, *, good: bool) -> None:
        """A content is there, whole; whether it is the right one."""
        # Offline there is nobody else to ask: the updater tries once more, and then it has failed.
        if not good and (self._link.connected or not self._config.offline):
            for name in self._book.mismatched(digest, now):
                log.error("%s brought a part of %s, and the whole is wrong: it rests", name, digest[:12])
        self.forget(digest)

    def forget(self, digest: str) -> None:
        """A content is not fetched any more."""
        running = self._running.get(digest)
        if running is not None:
            self._end(running)
        self._offers.pop(digest, None)
        self._book.finished(digest)

    def stop(self) -> None:
        """End every transfer."""
        for digest in list(self._running):
            self.forget(digest)

    def _end(self, running: _Running) -> None:
        running.transfer.cancel()
        del self._running[running.digest]

    def _by_number(self, number: int) -> _Running | None:
        return next((one for one in self._running.values() if one.transfer.number == number), None)

    # -- where it may be

    def _places(
        self, content: Content, now: float, silent_s: float | None
    ) -> dict[Place, Callable[[], Address | Bundle]]:
        """Where a content may be, and how to get there, which costs more than to know."""
        found: dict[Place, Callable[[], Address | Bundle]] = {}
        for bundle in self._bundles:
            if content.digest in bundle.artifacts:
                found[_place(SourceKind.USB, bundle.path.name)] = partial(_itself, bundle)
        for peer in self._turned(content):
            found[_place(SourceKind.PEER, peer)] = partial(self._peer, peer, content)
        for url in self._config.mirrors:
            parts = urlsplit(url)  # without the query, which may hold a secret
            place = _place(SourceKind.MIRROR, f"{parts.netloc}{parts.path.replace('/{digest}', '')}")
            found[place] = partial(self._mirror, url.replace("{digest}", content.digest))
        offer = self._offer(content, now, silent_s)
        if offer is not None:
            found[Place(SourceKind.HTTPS.value, SourceKind.HTTPS)] = partial(self._server, offer)
        return found

    def _turned(self, content: Content) -> list[str]:
        """The peers, each device beginning with another, so that they share the work."""
        peers = sorted({*self._config.peers, *self._peers.values()})
        first = crc32(f"{self._device_id}{content.digest}".encode()) % max(1, len(peers))
        return peers[first:] + peers[:first]

    def _peer(self, place: str, content: Content) -> Address:
        context = self._credentials.to_peers()
        path = f"{PEER_PATH}{content.digest}"
        if context is not None:
            fleet = self._credentials.fleet
            return Address(f"https://{place}{path}", context=context, server_name=DEVICE_HOST, organization=fleet)
        if not self._config.insecure_plain_http and not is_loopback(split_place(place)[0]):
            raise SourceError("without a certificate of the fleet no peer is asked: enrol this device")
        return Address(f"http://{place}{path}")

    def _mirror(self, url: str) -> Address:
        return Address(url, context=self._credentials.downloads(), plain=url.startswith("http:"))

    def _server(self, offer: SourceOffer) -> Address:
        return Address(offer.url, offer.ticket, self._credentials.downloads(), plain=offer.url.startswith("http:"))

    def _offer(self, content: Content, now: float, silent_s: float | None) -> SourceOffer | None:
        """The server's offer, asked for when HTTPS is about to be needed."""
        order = self._config.order
        if SourceKind.HTTPS not in order:
            return None
        known = self._offers.get(content.digest)
        early = order.index(SourceKind.HTTPS) < order.index(SourceKind.MQTT)
        wanted = early or silent_s is None or silent_s >= MQTT_SILENT_S / 2
        if wanted and self._link.connected and (known is None or now >= known.ask_at):
            known = self._offers[content.digest] = _Offer(None, now + ASK_AGAIN_S)
            self._say_need(SourceNeed(content.digest))
        return known.offer if known else None


def _place(kind: SourceKind, name: str) -> Place:
    return Place(f"{kind.value} {name}"[: LIMITS.name_chars], kind)


def _itself(bundle: Bundle) -> Bundle:
    return bundle


def _reader(where: Address | Bundle, content: Content, missing: tuple[ChunkRange, ...]) -> Reader:
    if isinstance(where, Bundle):
        return partial(read_chunks, where, content, missing)
    from agent.update.http_source import read_http  # and http.client with it: not every device needs them

    return partial(read_http, where, content, missing)
