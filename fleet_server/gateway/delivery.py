"""Delivers chunks: takes in what devices need, reads what is to be sent, and publishes it within the server's rate.

What is sent when, the streamer decides; who may have what, the handlers do.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from agent.protocol.limits import LIMITS
from agent.protocol.messages import ChunkRange, Need
from agent.protocol.topics import broadcast_topic, repair_topic
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.errors import FleetError
from fleet_server.gateway.streamer import Send, Streamer
from fleet_server.rates import TokenBucket

log = logging.getLogger(__name__)
POLL_S = 0.02
IDLE_S = 0.5
SHORTEST_S = 0.002  # between two looks: needs that come close together are answered together
BATCH = 64
KEPT_CHUNKS = 64  # 16 MiB at most: what was read a moment ago is read for repairs


class Delivery:
    """Streams chunks to devices. `hear` and `forget` may be called from any thread, `step` from one.

    Args:
        artifacts: where chunks are read.
        publish: sends a message; says whether it was handed over.
        rate: bytes a second at most, of all devices together; None for as fast as they take it.
    """

    def __init__(self, artifacts: ArtifactStore, publish: Callable[[str, bytes], bool], rate: float | None) -> None:
        self._artifacts = artifacts
        self._publish = publish
        self._streamer = Streamer()
        self._lock = threading.Lock()
        self._heard = threading.Event()
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._bucket = TokenBucket(rate, max(rate, LIMITS.chunk_bytes), time.monotonic()) if rate else None

    def hear(self, device_id: str, need: Need, chunks: int) -> None:
        """Take in a need. Spans beyond the artifact's end are cut off before anything is made of them."""
        inside = tuple(
            ChunkRange(span.first, min(span.last, chunks - 1)) for span in need.missing if span.first < chunks
        )
        bounded = Need(need.digest, need.deployment_id, inside, need.window, need.alone, need.rest_s, need.anew)
        with self._lock:
            self._streamer.hear(device_id, bounded, time.monotonic())
        self._heard.set()

    def forget(self, device_id: str) -> None:
        """A device is offline: nothing is sent to it, and nobody waits for it."""
        with self._lock:
            self._streamer.forget(device_id)

    def keep(self, streams: Callable[[str], bool]) -> None:
        """Send only contents for which this holds from now on: another server sends the others."""
        with self._lock:
            self._streamer.keep(streams)

    def step(self) -> None:
        """Send what is due, or wait a moment for a need."""
        self._heard.clear()
        now = time.monotonic()
        budget = BATCH if self._bucket is None else min(BATCH, int(self._bucket.level(now) // LIMITS.chunk_bytes))
        with self._lock:
            sends = list(self._streamer.next(now, budget)) if budget else []
        for send in sends:
            self._send(send)
        if sends:
            time.sleep(SHORTEST_S)
        else:
            self._heard.wait(IDLE_S if self._streamer.idle else POLL_S)

    def _send(self, send: Send) -> None:
        try:
            payload = self._combined(send)
        except FleetError as error:
            log.warning("can't read chunks %s of %s: %s", send.chunks, send.digest[:12], error)
            return
        if self._bucket is not None:
            self._bucket.take(len(payload), time.monotonic())
        if send.device_id is None:
            topic = broadcast_topic(send.digest, *send.chunks)
        else:
            topic = repair_topic(send.device_id, send.digest, send.chunks[0])
        self._publish(topic, payload)

    def _combined(self, send: Send) -> bytes:
        """The exclusive-or of its chunks; a shorter one counts as filled up with zeros."""
        payloads = [self._read(send.digest, chunk) for chunk in send.chunks]
        if len(payloads) == 1:
            return payloads[0]
        value = 0
        for payload in payloads:
            value ^= int.from_bytes(payload, "little")
        return value.to_bytes(max(map(len, payloads)), "little")

    def _read(self, digest: str, chunk: int) -> bytes:
        key = (digest, chunk)
        payload = self._kept.get(key)
        if payload is None:
            size = LIMITS.chunk_bytes
            payload = self._kept[key] = self._artifacts.read_range(digest, chunk * size, size)
            if len(self._kept) > KEPT_CHUNKS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return payload
