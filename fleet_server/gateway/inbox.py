"""What came in and waits to be handled: a queue a device, served in turns, each device within its share.

A device that floods loses its own messages (devices say again what matters) and delays nobody else's. MQTT has handed a
message over when it comes here, so nothing below slows a flooding device down; the broker bounds what it may send. When
the server is behind it is telemetry that finds no room first: devices keep it until the server says that it has it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from fleet_server.rates import KeyedBuckets

LOOKED_AT = 4  # devices for each message that is taken in one go


@dataclass(frozen=True)
class Share:
    """What one device may send: sustained and at once. An honest device stays far below.

    Attributes:
        messages_s: messages a second.
        messages: messages at once.
        bytes_s: bytes a second.
        bytes: bytes at once.
        waiting: messages that may wait for the server.
    """

    messages_s: float = 100.0
    messages: float = 1000.0
    bytes_s: float = 4e6
    bytes: float = 32e6
    waiting: int = 500


class Message(NamedTuple):
    """What came in; made and compared more often than all else here.

    Attributes:
        retained: the broker had kept it, and sends it because it was just subscribed to.
    """

    topic: str
    payload: bytes
    retained: bool = False


class FairInbox:
    """Filled by the link's thread, emptied by the handler's.

    Args:
        flooded: told the device whose message was dropped; called from the link's thread, must only note it.
        whole: messages that each say all that the ones before on their topic said: only the newest of them waits.
        kept: messages that their devices keep until they are answered: they get in while the inbox is half empty, and
            the same one waits once.
        share: of one device.
        limit: messages of all devices that may wait.
        limit_bytes: bytes of all devices that may wait.

    Attributes:
        overflowed: messages that were dropped because too many of all devices waited.
    """

    def __init__(
        self,
        flooded: Callable[[str], None],
        share: Share | None = None,
        *,
        whole: Callable[[Message], bool] = lambda _message: False,
        kept: Callable[[Message], bool] = lambda _message: False,
        limit: int = 20_000,
        limit_bytes: int = 256 * 1024 * 1024,
    ) -> None:
        self._flooded = flooded
        self._whole = whole
        self._kept = kept
        self._share = share or Share()
        self._limit = limit
        self._limit_bytes = limit_bytes
        self.overflowed = 0
        self._messages = KeyedBuckets(self._share.messages_s, self._share.messages)
        self._bytes = KeyedBuckets(self._share.bytes_s, self._share.bytes)
        self._queues: dict[str, deque[Message]] = {}
        self._turns: deque[str] = deque()
        self._count = self._size = 0
        self._changed = threading.Condition()

    def put(self, message: Message) -> None:
        """Keep a message, or drop it when its device is beyond its share or the inbox is full."""
        sender = sender_of(message.topic)
        kept = self._kept(message)
        with self._changed:
            waiting = self._queues.get(sender, deque())
            if not self._within_share(sender, message, len(waiting)):
                self._flooded(sender)
            elif kept and message in waiting:
                pass  # sent again before the first was answered
            elif self._whole(message) and self._replace(waiting, message):
                pass
            elif self._has_room(message, kept=kept):
                if sender not in self._queues:
                    self._queues[sender] = waiting
                    self._turns.append(sender)
                waiting.append(message)
                self._count += 1
                self._size += len(message.payload)
                self._changed.notify()
            else:
                self.overflowed += 1

    @property
    def waiting(self) -> int:
        """How many messages wait."""
        return self._count

    @property
    def waiting_bytes(self) -> int:
        """How many bytes those have."""
        return self._size

    def get(self, timeout_s: float) -> Message | None:
        """The next message of the device whose turn it is; None when nothing came for that long."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._count > 0, timeout_s):
                return None
            return self._take()

    def get_more(self, like: Callable[[Message], bool], *, limit: int, limit_bytes: int) -> list[Message]:
        """What waits already and is alike, of each device as far as nothing else comes before it; the rest stays.

        Args:
            like: which messages are taken.
            limit: how many at most; of so many devices, and some more, it is looked for.
            limit_bytes: how many bytes at most.
        """
        found: list[Message] = []
        others: list[str] = []
        size = 0
        with self._changed:
            while self._turns and len(found) < limit and len(others) < LOOKED_AT * limit:
                following = self._queues[self._turns[0]][0]
                if not like(following):
                    others.append(self._turns.popleft())
                    continue
                size += len(following.payload)
                if size > limit_bytes:
                    break
                found.append(self._take())
            self._turns.extendleft(reversed(others))
        return found

    def _replace(self, waiting: deque[Message], message: Message) -> bool:
        """Put it where the one before waits, or it would be put off again and again; whether there was one."""
        for place, older in enumerate(waiting):
            if older.topic == message.topic:
                waiting[place] = message
                self._size += len(message.payload) - len(older.payload)
                return True
        return False

    def _take(self) -> Message:
        sender = self._turns.popleft()
        waiting = self._queues[sender]
        message = waiting.popleft()
        if waiting:
            self._turns.append(sender)
        else:
            del self._queues[sender]
        self._count -= 1
        self._size -= len(message.payload)
        return message

    def _within_share(self, sender: str, message: Message, waiting: int) -> bool:
        now, size = time.monotonic(), len(message.payload)
        messages, content = self._messages.of(sender, now), self._bytes.of(sender, now)
        within = messages.take(1, now) and content.take(size, now)
        return within and waiting < self._share.waiting

    def _has_room(self, message: Message, *, kept: bool) -> bool:
        part = 0.5 if kept else 1.0
        size = self._size + len(message.payload)
        return self._count < part * self._limit and size <= part * self._limit_bytes


def sender_of(topic: str) -> str:
    """The device a topic names; empty for what is no device's."""
    parts = topic.split("/", 5)
    return parts[4] if len(parts) == 6 and parts[3] == "d" else ""
