"""Parts to devices and answers back, between the requests' threads and the broker's. It decides nothing.

An answer goes to the request that waits for it, by its part's id; this server hears the answers of those devices alone
that it has asked, so several servers share a fleet.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass

import msgspec

from agent.protocol.codec import decode, encode
from agent.protocol.errors import WireError
from agent.protocol.messages import Presence
from agent.protocol.parts import InferPart, PartAnswer
from agent.protocol.topics import DeviceTopic, device_topic, parse_device_topic
from fleet_server.domain.inference import Speeds

log = logging.getLogger(__name__)
INFERRED, PRESENCE = f"/{DeviceTopic.INFERRED}", f"/{DeviceTopic.PRESENCE}"

Publish = Callable[[str, bytes], bool]


@dataclass(frozen=True)
class Answered:
    """A device said something of a part.

    Attributes:
        sending: as it was sent.
        device: that said it.
        answer: what it said.
    """

    sending: int
    device: str
    answer: PartAnswer


@dataclass(frozen=True)
class Gone:
    """A device is offline."""

    device: str


@dataclass(frozen=True)
class _Asked:
    exchange: Exchange
    sending: int
    devices: frozenset[str]


class Exchange:
    """What is said in one request; closed when it is over: later answers are for nobody."""

    def __init__(self, dispatch: Dispatch) -> None:
        self._dispatch = dispatch
        self._heard: queue.SimpleQueue[Answered | Gone] = queue.SimpleQueue()

    def send(self, device: str, devices: Collection[str], sending: int, part: InferPart) -> bool:
        """Send a part to a device; whether the broker's link took it.

        Args:
            device: the first that works on it.
            devices: that may answer it.
            sending: told again with the answer.
            part: its id is replaced by one that nobody can guess.
        """
        return self._dispatch.send(_Asked(self, sending, frozenset(devices)), device, part)

    def get(self, timeout_s: float) -> Answered | Gone | None:
        """What is heard next, within that time."""
        try:
            return self._heard.get(timeout=max(timeout_s, 0.0))
        except queue.Empty:
            return None

    def hear(self, event: Answered | Gone) -> None:
        """Called from the link's thread."""
        self._heard.put(event)

    def close(self) -> None:
        """Wait for nothing more."""
        self._dispatch.forget(self)


class Dispatch:
    """All requests of this server.

    Args:
        publish: hands a message to the broker's link.
        listen: subscribes to a topic, for good.

    Attributes:
        speeds: what is known of devices.
    """

    def __init__(self, publish: Publish, listen: Callable[[str], None]) -> None:
        self._publish = publish
        self._listen = listen
        self._lock = threading.Lock()
        self._asked: dict[str, _Asked] = {}
        self._exchanges: set[Exchange] = set()
        self.speeds = Speeds()

    def open(self) -> Exchange:
        """For a request."""
        exchange = Exchange(self)
        with self._lock:
            self._exchanges.add(exchange)
        return exchange

    def send(self, asked: _Asked, device: str, part: InferPart) -> bool:
        """See `Exchange.send`."""
        part_id = secrets.token_hex(16)
        named = msgspec.structs.replace(part, part_id=part_id)
        for one in asked.devices:
            self._listen(device_topic(one, DeviceTopic.INFERRED))
        with self._lock:
            self._asked[part_id] = asked
        return self._publish(device_topic(device, DeviceTopic.INFER), encode(named))

    def forget(self, exchange: Exchange) -> None:
        """See `Exchange.close`."""
        with self._lock:
            self._exchanges.discard(exchange)
            self._asked = {one: asked for one, asked in self._asked.items() if asked.exchange is not exchange}

    def hear(self, topic: str, payload: bytes) -> bool:
        """Take a message of a device; whether it was for nobody else. Called from the link's thread."""
        if topic.endswith(INFERRED):
            self._answer(topic, payload)
            return True
        if topic.endswith(PRESENCE) and self._exchanges:
            self._presence(topic, payload)
        return False

    def _answer(self, topic: str, payload: bytes) -> None:
        try:
            device = parse_device_topic(topic).device_id
            answer = decode(payload, PartAnswer)
        except WireError as refused:
            log.warning("refused a message on %s: %s", topic[:200], refused)
            return
        with self._lock:
            asked = self._asked.get(answer.part_id)
            if asked is None or device not in asked.devices:
                return  # of a request that is over, or of a device that was not asked
            del self._asked[answer.part_id]
        asked.exchange.hear(Answered(asked.sending, device, answer))

    def _presence(self, topic: str, payload: bytes) -> None:
        try:
            device = parse_device_topic(topic).device_id
            if payload and decode(payload, Presence).online:
                return
        except WireError:
            return  # whoever handles the message says so
        with self._lock:
            exchanges = list(self._exchanges)
        for one in exchanges:
            one.hear(Gone(device))
