"""Messages of a broker. One is acknowledged when its result is kept, or else sent again."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import paho.mqtt.client as paho

from agent.pipelines.broker import connect, new_client, place
from agent.pipelines.config import MqttSource
from agent.pipelines.content import content_type, refusal
from agent.pipelines.items import Answer, Item, SourceError

WAITING = 64
WAITING_BYTES = 128 << 20
REMEMBERED = 256


@dataclass(frozen=True)
class _Message:
    topic: str
    payload: bytes
    number: int
    qos: int
    epoch: int
    at: float

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.topic.encode() + b"\0" + self.payload).hexdigest()


class Mqtt:
    """The source.

    Args:
        config: of it.
        identity: names its session at the broker.
        dropped: is told how many messages went because too many wait; called from another thread.
        newest: of messages that nobody took, only the newest stays.
    """

    def __init__(self, config: MqttSource, identity: str, dropped: Callable[[int], None], *, newest: bool) -> None:
        self.live = newest
        self._config, self._identity = config, identity
        self._client: paho.Client | None = None
        self._lock = threading.Condition()
        self._waiting: deque[_Message] = deque()
        self._settled: OrderedDict[int, str] = OrderedDict()  # by message number, what it was
        self._epoch = 0
        self._away_since: float | None = None
        self._why = "it does not answer"
        self._dropped = dropped

    def next(self, wait_s: float) -> Item | None:
        """The next message; the newest, where only that counts."""
        if self._client is None:
            self._start()
        with self._lock:
            if not self._waiting:
                self._lock.wait(wait_s)
            message = self._waiting.popleft() if self._waiting else None
            since = self._away_since
        if message is None:
            if since is not None and time.monotonic() - since > self._config.away_s:
                raise SourceError(f"the broker {place(self._config.url)} is away: {self._why}")
            return None
        about = {"topic": message.topic}
        kind, why = content_type(message.payload), refusal(message.payload)
        return Item(message.payload, kind, about, taken_at=message.at, refusal=why, acknowledge=message)

    def settled(self, item: Item, answer: Answer | None) -> None:  # noqa: ARG002
        """The broker may forget it."""
        message: _Message = item.acknowledge
        with self._lock:
            self._settled[message.number] = message.digest
            while len(self._settled) > REMEMBERED:
                self._settled.popitem(last=False)
            current = message.epoch == self._epoch
        if current:
            self._acknowledge(message)

    def close(self) -> None:
        """Nothing: the connection mends itself, and what waits stays."""

    def _start(self) -> None:
        try:
            client = new_client(self._config.url, self._config.ca_file, self._identity, manual_ack=True)
        except OSError as error:
            raise SourceError(f"the certificates of `ca_file` can't be read: {error}") from None
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        self._away_since = time.monotonic()
        self._client = client
        connect(client, self._config.url)

    def _on_connect(self, client: paho.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            self._why = f"it refused the connection: {reason}"
            return
        with self._lock:
            self._away_since = None
        client.subscribe(self._config.topic, qos=1)

    def _on_disconnect(self, _client: Any, _data: Any, _flags: Any, _reason: Any, _properties: Any) -> None:
        with self._lock:
            # The broker sends again what it was told nothing of, by numbers that mean something else from now on.
            self._epoch += 1
            self._waiting = deque(one for one in self._waiting if one.qos == 0)
            if self._away_since is None:
                self._away_since = time.monotonic()

    def _on_message(self, _client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        payload = bytes(message.payload)
        with self._lock:
            taken = _Message(message.topic, payload, message.mid, message.qos, self._epoch, time.time())
            if message.dup and self._settled.get(message.mid) == taken.digest:
                gone = [taken]
            else:
                self._waiting.append(taken)
                most = 1 if self.live else WAITING
                gone = []
                while len(self._waiting) > 1 and (
                    len(self._waiting) > most or sum(len(one.payload) for one in self._waiting) > WAITING_BYTES
                ):
                    gone.append(self._waiting.popleft())
                if gone and not self.live:
                    self._dropped(len(gone))
                self._lock.notify()
        for one in gone:
            self._acknowledge(one)

    def _acknowledge(self, message: _Message) -> None:
        client = self._client
        if client is not None and message.qos:
            with contextlib.suppress(ValueError, OSError):
                client.ack(message.number, message.qos)
