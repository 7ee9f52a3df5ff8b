"""Parts whose route goes on: what this device answered is sent to the next ones over the LAN, where that works.

What can't be sent so goes back to the server with the rest of the route, and the server sends it on: nothing is lost by
trying. Addresses come from the server, which has them from other devices: only such of the LAN are connected to.
"""

from __future__ import annotations

import ipaddress
import logging
import queue
import threading
import time
from collections.abc import Callable
from urllib.parse import quote

import msgspec

from agent.client.connection import Connection
from agent.client.http1 import Reply
from agent.protocol.datatypes import HEADER_LENGTH, HEADER_LENGTH_READ
from agent.protocol.limits import LIMITS
from agent.protocol.parts import Hop, InferPart, PartAnswer

log = logging.getLogger(__name__)
AT_ONCE = 8  # parts that are on their way from here
BINARY = "application/octet-stream"

Say = Callable[[PartAnswer], None]


def is_of_lan(address: str) -> bool:
    """Whether `host:port` is a literal address that the Internet does not have: private, link-local or loopback."""
    host, _, port = address.rpartition(":")
    if not (port.isascii() and port.isdigit() and 0 < int(port[:9]) < 65536):
        return False
    try:
        found = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return (found.is_private or found.is_link_local) and not found.is_unspecified and not found.is_multicast


def next_request(body: bytes, header_length: int) -> tuple[bytes, int]:
    """A stage's answer as the request to the next stage, whose inputs have the same names; and the length of its JSON.

    Raises:
        ValueError: where it is no answer with binary tensors.
    """
    header = msgspec.json.decode(body[:header_length])
    outputs = header.get("outputs") if isinstance(header, dict) else None
    if not isinstance(outputs, list) or not all(isinstance(one, dict) for one in outputs):
        raise ValueError("outputs: there are none")
    asked = {"parameters": {"binary_data_output": True}, "inputs": outputs}
    made = msgspec.json.encode(asked)
    return made + body[header_length:], len(made)


def infer_path(model: str, version: str | None) -> str:
    """Where the local API is asked to infer."""
    of = "" if version is None else f"/versions/{quote(version, safe='')}"
    return f"/v2/models/{quote(model, safe='')}{of}/infer"


def header_length_of(reply: Reply) -> int:
    """The length of an answer's JSON; all of it where it does not say."""
    said = reply.headers.get(HEADER_LENGTH_READ, "")
    whole = len(reply.body)
    return min(int(said), whole) if said.isascii() and said.isdigit() and len(said) < 10 else whole


class Forwarder:
    """Sends on what this device answered.

    Args:
        say: publishes an answer; called from several threads.
    """

    def __init__(self, say: Say) -> None:
        self._say = say
        self._room = threading.BoundedSemaphore(AT_ONCE)
        self._waiting: queue.SimpleQueue[tuple[PartAnswer, float] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def take(self, part: InferPart, answer: PartAnswer) -> bool:
        """Send an answer on; False where it has to go by the server."""
        hop = part.route[0] if part.route else None
        if answer.status != 200 or hop is None or hop.address is None or not is_of_lan(hop.address):
            return False
        if not self._room.acquire(blocking=False):
            return False
        left_s = part.deadline_ms / 1000 - answer.queue_s - answer.infer_s
        self._waiting.put((answer, time.monotonic() + left_s))
        while len(self._threads) < AT_ONCE:
            thread = threading.Thread(target=self._work, name="forwarding", daemon=True)
            self._threads.append(thread)
            thread.start()
        return True

    def stop(self) -> None:
        """Send no more."""
        for _ in self._threads:
            self._waiting.put(None)

    def _work(self) -> None:
        connections: dict[str, Connection] = {}
        while (waiting := self._waiting.get()) is not None:
            try:
                self._say(self._passed(*waiting, connections))
            except Exception:
                log.exception("a part could not be passed on")
            finally:
                self._room.release()
        for one in connections.values():
            one.close()

    def _passed(self, answer: PartAnswer, until: float, connections: dict[str, Connection]) -> PartAnswer:
        """What the devices of the route made of it, as far as they were reached; the server goes on from there."""
        hops = [*answer.hops, answer.infer_s]
        while answer.route and answer.route[0].address is not None and is_of_lan(answer.route[0].address):
            hop, *rest = answer.route
            began = time.monotonic()
            try:
                body, length = self._asked(hop, answer, until, connections)
            except (OSError, ValueError) as error:
                log.info("%s does not take a part at %s (%s): it goes by the server", hop.device, hop.address, error)
                break
            hops.append(time.monotonic() - began)
            answer = msgspec.structs.replace(answer, body=body, header_length=length, route=tuple(rest))
        return msgspec.structs.replace(answer, hops=tuple(hops[: LIMITS.hops]))

    def _asked(
        self, hop: Hop, answer: PartAnswer, until: float, connections: dict[str, Connection]
    ) -> tuple[bytes, int]:
        assert hop.address is not None
        if hop.address not in connections and len(connections) >= LIMITS.hops:
            connections.pop(next(iter(connections))).close()
        connection = connections.setdefault(hop.address, Connection(hop.address, ""))
        body, length = next_request(answer.body, answer.header_length)
        headers = {"Content-Type": BINARY, HEADER_LENGTH: str(length)}
        reply = connection.ask("POST", infer_path(hop.model, hop.version), body, headers, until - time.monotonic())
        if reply.status != 200:
            raise ValueError(reply.said[: LIMITS.detail_chars])
        if len(reply.body) > LIMITS.part_bytes:
            raise ValueError(f"its answer has {len(reply.body)} bytes, a message holds {LIMITS.part_bytes}")
        return bytes(reply.body), header_length_of(reply)
