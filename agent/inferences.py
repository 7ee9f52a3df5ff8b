"""Parts of inference requests that the server sends: handed to the worker by the local API, answered over MQTT.

Bodies pass as they are: nothing here decodes a tensor. What waits is bounded in parts and bytes; beyond that the server
is told to ask again, so that it asks another device.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agent.addresses import check_place
from agent.client.connection import Connection, CutOffError
from agent.client.http1 import Reply
from agent.errors import ConfigError
from agent.forwarding import BINARY, Forwarder, header_length_of, infer_path, is_of_lan
from agent.protocol.datatypes import HEADER_LENGTH
from agent.protocol.limits import LIMITS
from agent.protocol.parts import InferPart, PartAnswer
from agent.tables import Table

log = logging.getLogger(__name__)
AT_ONCE = 2  # parts that the worker is asked together: while one is sent back, it has the next
WAITING = 16
WAITING_BYTES = 16 << 20
BUSY_S = 0.2  # after which the server may ask again

Say = Callable[[PartAnswer], None]


@dataclass(frozen=True)
class InferenceConfig:
    """What the device's owner allows.

    Attributes:
        remote: whether the server may send rows here for the device's models to answer.
        address: `host:port` at which other devices of the LAN reach the local API, to pass on what they made of rows of
            a model that is cut into stages; empty where they are to go by the server.
    """

    remote: bool = True
    address: str = ""


def read_inference(values: Any) -> InferenceConfig:
    """Read the table `[inference]`.

    Raises:
        ConfigError: naming the key and the remedy.
    """
    table = Table("inference", values)
    config = InferenceConfig(table.flag("remote", default=InferenceConfig.remote), table.text("address", ""))
    if config.address and not is_of_lan(check_place("inference.address", config.address)):
        raise ConfigError("inference.address: name an address of the LAN in numbers, such as 192.168.1.7:8470")
    table.refuse_rest()
    return config


@dataclass(frozen=True)
class _Waiting:
    part: InferPart
    came: float


class Inferences:
    """The parts of a device.

    Args:
        config: of its owner.
        place: gives the local API's `host:port` and the path of its Unix socket, empty where there is none.
        say: publishes an answer; called from several threads.
    """

    def __init__(self, config: InferenceConfig, place: Callable[[], tuple[str, str]], say: Say) -> None:
        self._config = config
        self._place = place
        self._say = say
        self._forwarder = Forwarder(say)
        self._parts: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = self._bytes = 0
        self._threads: list[threading.Thread] = []

    def received(self, part: InferPart) -> None:
        """Take a part, or say why not; it never waits."""
        if not self._config.remote:
            self._refuse(part, 403, "its owner does not let the server ask its models ([inference] remote = false)")
        elif not self._admit(part):
            self._refuse(part, 429, "as many parts as it takes wait already", retry_after_s=BUSY_S)
        else:
            self._parts.put(_Waiting(part, time.monotonic()))
            self._start()

    def stop(self) -> None:
        """Answer no more; what waits is asked of another device."""
        for _ in self._threads:
            self._parts.put(None)
        self._forwarder.stop()

    def _start(self) -> None:
        """Threads begin when the first part comes: most devices are never asked."""
        while len(self._threads) < AT_ONCE:
            thread = threading.Thread(target=self._work, name="inferences", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _admit(self, part: InferPart) -> bool:
        with self._lock:
            if self._waiting >= WAITING or self._bytes + len(part.body) > WAITING_BYTES:
                return False
            self._waiting += 1
            self._bytes += len(part.body)
            return True

    def _work(self) -> None:
        connection = None
        while (waiting := self._parts.get()) is not None:
            connection = connection or Connection(*self._place())
            try:
                self._answer(waiting, connection)
            except Exception:
                log.exception("a part could not be answered")
            finally:
                with self._lock:
                    self._waiting -= 1
                    self._bytes -= len(waiting.part.body)
        if connection is not None:
            connection.close()

    def _answer(self, waiting: _Waiting, connection: Connection) -> None:
        part, began = waiting.part, time.monotonic()
        queued = began - waiting.came
        left = part.deadline_ms / 1000 - queued
        if left <= 0:
            self._refuse(part, 504, "its time was over before its turn came")
            return
        headers = {"Content-Type": BINARY, HEADER_LENGTH: str(part.header_length)}
        try:
            reply = connection.ask("POST", infer_path(part.model, part.version), part.body, headers, left)
        except TimeoutError:
            self._refuse(part, 504, "the model did not answer in time")
            return
        except CutOffError:
            self._refuse(part, 502, "the inference worker ended while it answered")
            return
        except OSError as error:
            self._refuse(part, 503, f"the inference worker can't be asked: {error}", retry_after_s=1.0)
            return
        answer = self._told(part, reply, queued, time.monotonic() - began)
        if not self._forwarder.take(part, answer):
            self._say(answer)

    def _told(self, part: InferPart, reply: Reply, queue_s: float, infer_s: float) -> PartAnswer:
        status, error, body, length = reply.status, "", bytes(reply.body), 0
        if status != 200:
            error, body = reply.said[: LIMITS.detail_chars], b""
        elif len(body) > LIMITS.part_bytes:
            status, error, body = 413, f"the answer has {len(body)} bytes, a message holds {LIMITS.part_bytes}", b""
        else:
            length = header_length_of(reply)
        return PartAnswer(
            part.part_id,
            part.attempt,
            status,
            header_length=length,
            body=body,
            error=error,
            retry_after_s=reply.again_after_s,
            queue_s=queue_s,
            infer_s=infer_s,
            waiting=max(0, self._waiting - AT_ONCE),
            route=part.route if status == 200 else (),
        )

    def _refuse(self, part: InferPart, status: int, error: str, *, retry_after_s: float = 0.0) -> None:
        self._say(
            PartAnswer(
                part.part_id,
                part.attempt,
                status,
                error=error[: LIMITS.detail_chars],
                retry_after_s=retry_after_s,
                waiting=self._waiting,
            )
        )
