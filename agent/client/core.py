"""What a client does, whatever way it waits: `Client` and `AsyncClient` are this, with one way each."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec
import numpy as np

from agent.client.again import AGAIN_S, Again
from agent.client.connection import Link
from agent.client.encoding import Answer, Wish, answer_of, parts_of
from agent.client.errors import BadRequestError, InferenceError, ModelFailedError, NotReadyError, TimedOutError
from agent.client.http1 import Ask, Reply
from agent.client.inference import Inference
from agent.client.lane import Lane, RefusedError
from agent.client.memory import SharedMemory
from agent.client.sizes import Sizes
from agent.client.waiting import Waiting
from agent.pipelines.content import content_type
from agent.protocol.datatypes import HEADER_LENGTH_READ

ValueT = TypeVar("ValueT")
SOCKET = "/run/shoal/api.sock"
LISTEN = "127.0.0.1:8470"
READY_S = 1.0  # in which a model that is ready says so
CLOSE_S = 1.0  # in which the API is told what it need not know any more
UNKNOWN_IMAGE = "image/unknown"  # the API says which it takes
JSON = "application/json"


@dataclass(frozen=True)
class Settings:
    """Of a client; see `agent.client.Client`."""

    address: str | None
    connections: int
    timeout_s: float
    shared_memory: bool


class FeedbackResult(msgspec.Struct, frozen=True):
    """What became of labels.

    Attributes:
        matched_rows: whose answers were known, and are judged by these labels.
        unknown_ids: of requests that the device does not know: never asked, told of before, too long ago, or of a
            worker that has ended.
    """

    matched_rows: int
    unknown_ids: int


class Core:
    """A client.

    Args:
        settings: of it.
        waiting: how it waits.
    """

    def __init__(self, settings: Settings, waiting: Waiting) -> None:
        self._listen, self._unix_socket = _address(settings.address)
        self._settings = settings
        self._waiting = waiting
        self._turns = waiting.turns(settings.connections)
        self._free: list[Lane] = []
        self._sizes = Sizes()
        self._closed = False

    async def close(self) -> None:
        """End connections, at once or when the call that uses one ends, and remove what is in shared memory."""
        self._closed = True
        while self._free:
            await self._free.pop().close(time.monotonic() + CLOSE_S)

    async def infer(
        self, model: str, version: str | None, inputs: Mapping[str, Any], wish: Wish, timeout_s: float | None
    ) -> Answer:
        """See `agent.client.Client.infer`."""
        parts = parts_of(inputs)
        outputs = None if wish.outputs is None else tuple(wish.outputs)
        kind = (model, version, outputs, tuple((part.name, part.kind, part.shape) for part in parts))
        one = Inference(_path(model, version, "infer"), parts, wish, kind)
        return await self._insist(lambda lane, again: one.by(lane, self._sizes, again), timeout_s)

    async def infer_image(
        self, model: str, version: str | None, image: bytes, request_id: str, timeout_s: float | None
    ) -> Answer:
        """See `agent.client.Client.infer_image`."""
        kind = content_type(image)
        headers = {"Content-Type": kind if kind.startswith("image/") else UNKNOWN_IMAGE}
        headers |= {"X-Request-ID": request_id} if request_id else {}
        reply = await self._ask(Ask("POST", _path(model, version, "infer"), [image], headers), timeout_s)
        return answer_of(reply.body, reply.headers.get(HEADER_LENGTH_READ, ""))

    async def feedback(
        self, model: str, labels: Mapping[str, int | Sequence[int]], timeout_s: float | None
    ) -> FeedbackResult:
        """See `agent.client.Client.feedback`."""
        told = [{"id": request_id, "label": _label(request_id, label)} for request_id, label in labels.items()]
        body = msgspec.json.encode({"labels": told})
        ask = Ask("POST", _path(model, None, "feedback"), [body], {"Content-Type": JSON})
        return _decoded(await self._ask(ask, timeout_s), FeedbackResult)

    async def metadata(self, model: str, timeout_s: float | None) -> dict[str, Any]:
        """See `agent.client.Client.metadata`."""
        return _decoded(await self._ask(Ask("GET", _path(model, None)), timeout_s), dict[str, Any])

    async def ready(self, model: str, timeout_s: float) -> bool:
        """See `agent.client.Client.ready`."""
        until = time.monotonic() + timeout_s
        return await self._ready(model, until, until)

    async def wait_until_ready(self, model: str, timeout_s: float) -> None:
        """See `agent.client.Client.wait_until_ready`."""
        until = time.monotonic() + timeout_s
        while not await self._ready(model, until, min(until, time.monotonic() + READY_S)):
            if time.monotonic() + AGAIN_S >= until:
                said = f"model {model!r} was not ready within {timeout_s:g} s: `shoal device show` says why"
                raise NotReadyError(said)
            await self._waiting.pause(AGAIN_S)

    async def _ready(self, model: str, turn_until: float, until: float) -> bool:
        lane = await self._take(turn_until)
        try:
            await lane.ask(Ask("GET", _path(model, None, "ready")), until)
        except (RefusedError, OSError):
            return False
        finally:
            await self._give(lane)
        return True

    async def _ask(self, ask: Ask, timeout_s: float | None) -> Reply:
        return await self._insist(lambda lane, again: lane.ask(ask, again.until), timeout_s)

    async def _insist(self, attempt: Callable[[Lane, Again], Awaitable[ValueT]], timeout_s: float | None) -> ValueT:
        """What an attempt comes to, made again as long as what is in its way may pass.

        Raises:
            InferenceError: the one that says why it came to nothing.
        """
        again = Again(time.monotonic() + (self._settings.timeout_s if timeout_s is None else timeout_s))
        while True:
            again.left_s()
            lane = await self._take(again.until)
            try:
                return await attempt(lane, again)
            except RefusedError as refused:
                pause_s = again.after(refused.reply)
            except OSError as error:
                pause_s = again.after_failure(error)
            finally:
                await self._give(lane)
            await self._waiting.pause(pause_s)

    async def _take(self, until: float) -> Lane:
        if self._closed:
            raise InferenceError("the client is closed")
        if not await self._turns.take(until):
            raise TimedOutError(f"all {self._settings.connections} connections of this client are in use")
        try:
            return self._free.pop()
        except IndexError:
            link = Link(self._listen, self._unix_socket, self._waiting)
            return Lane(link, SharedMemory() if self._settings.shared_memory else None)

    async def _give(self, lane: Lane) -> None:
        self._free.append(lane)
        self._turns.give()
        if self._closed:
            await self.close()


def _label(request_id: str, label: int | Sequence[int]) -> Any:
    found = np.asarray(label)
    if found.dtype.kind not in "iu" or found.ndim > 1:
        said = f"labels: that of {request_id[:100]!r} is no index of a class, or one a row"
        raise BadRequestError(said, ("labels", request_id))
    return found.tolist()


def _decoded(reply: Reply, kind: type[ValueT]) -> ValueT:
    try:
        return msgspec.json.decode(reply.body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelFailedError(f"the inference API gave an answer that can't be read: {error}") from None


@lru_cache(maxsize=64)
def _path(model: str, version: str | None, *what: str) -> str:
    parts = ["models", model, *(() if version is None else ("versions", version)), *what]
    return "/".join(["/v2", *(quote(part, safe="") for part in parts)])


def _address(given: str | None) -> tuple[str, str]:
    """`host:port` and the path of a Unix socket, one of which is empty."""
    if given is not None:
        return ("", given.removeprefix("unix:")) if given.startswith("unix:") else (given, "")
    socket = os.environ.get("SHOAL_AGENT_UNIX_SOCKET") or (SOCKET if Path(SOCKET).exists() else "")
    return ("", socket) if socket else (os.environ.get("SHOAL_AGENT_LISTEN") or LISTEN, "")
