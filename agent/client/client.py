"""The client: one call, one answer, whatever happens to the worker meanwhile."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import msgspec

from agent.client.connection import Body, Connection, CutOffError, Reply
from agent.client.encoding import Part, Wish, header, outputs_of, parts_of
from agent.client.errors import (
    BadRequestError,
    BusyError,
    InferenceError,
    ModelFailedError,
    NotReadyError,
    TimedOutError,
    UnknownModelError,
)
from agent.client.memory import SharedMemory
from agent.pipelines.content import content_type
from agent.runtimes.base import Array

ValueT = TypeVar("ValueT")
SOCKET = "/run/shoal/api.sock"
LISTEN = "127.0.0.1:8470"
CONNECTIONS = 8
TIMEOUT_S = 30.0
AGAIN_S = 0.05  # before it is asked again, where the API does not say
AGAIN_MOST_S = 1.0
CUT_OFF_MOST = 3  # connections that end under one request, before it is taken to be the reason
# Below, a copy through the socket costs no more than the words about a region: measured, 1 client, Unix socket.
SHARED_FROM = 64 << 10
UNKNOWN_IMAGE = "image/unknown"  # the API says which it takes


class _Lane:
    """A connection, and the shared memory that belongs to it."""

    def __init__(self, listen: str, unix_socket: str, *, shared: bool) -> None:
        self.connection = Connection(listen, unix_socket)
        self.memory = SharedMemory() if shared else None

    def close(self) -> None:
        if self.memory is not None:
            if self.memory.registered:
                self._tell("unregister", b"", 1.0)
            self.memory.close()
        self.connection.close()

    def place(self, parts: Sequence[Part], wait_s: float) -> list[int] | None:
        """Put inputs into shared memory; None where that is not to be had, now and from then on."""
        if self.memory is None or sum(part.content.nbytes for part in parts) < SHARED_FROM:
            return None
        try:
            offsets = self.memory.hold([part.content for part in parts])
        except OSError:
            self._without()
            return None
        if self.memory.registered or self._register(wait_s):
            return offsets
        if self.memory is not None:
            self.memory.forgotten()
        return None

    def _register(self, wait_s: float) -> bool:
        assert self.memory is not None
        self._tell("unregister", b"", wait_s)  # what it knows by this name is another object, or nothing
        body = msgspec.json.encode({"key": f"/{self.memory.name}", "offset": 0, "byte_size": self.memory.size})
        reply = self._tell("register", body, wait_s)
        if reply is None:
            return False
        if reply.status != 200:
            self._without()  # the agent's user may not read it, the API is not of this machine, or has no room
            return False
        self.memory.opened()
        return True

    def _tell(self, what: str, body: bytes, wait_s: float) -> Reply | None:
        assert self.memory is not None
        path = f"/v2/systemsharedmemory/region/{self.memory.name}/{what}"
        try:
            return self.connection.ask("POST", path, body, {"Content-Type": "application/json"}, wait_s)
        except OSError:
            return None

    def _without(self) -> None:
        if self.memory is not None:
            self.memory.close()
        self.memory = None


class Client:
    """Asks the models that this device serves. May be used by several threads, and as a context.

    What passes by itself is waited for within the time that a call has: a model that is being loaded, a worker that
    starts again, a full queue. An inference has no effect, so it is asked again where its answer was lost.

    Args:
        address: `unix:/path` or `host:port`; by default SHOAL_AGENT_UNIX_SOCKET, the installed agent's socket
            (/run/shoal/api.sock) where there is one, SHOAL_AGENT_LISTEN, or 127.0.0.1:8470.
        connections: at most, and so requests at once; others wait.
        timeout_s: of a call that names no other.
        shared_memory: whether large inputs may go by shared memory.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        connections: int = CONNECTIONS,
        timeout_s: float = TIMEOUT_S,
        shared_memory: bool = True,
    ) -> None:
        self._listen, self._unix_socket = _address(address)
        self._timeout_s = timeout_s
        self._shared = shared_memory
        self._lanes: list[_Lane] = []
        self._free: queue.LifoQueue[_Lane] = queue.LifoQueue()
        self._most = connections
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> Self:
        """The client."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """End its connections, and remove its shared memory; no call may be under way."""
        with self._lock:
            self._closed = True
            lanes, self._lanes = self._lanes, []
        for lane in lanes:
            lane.close()

    def infer(
        self,
        model: str,
        inputs: Mapping[str, Any],
        *,
        version: str | None = None,
        outputs: Sequence[str] | None = None,
        priority: int | None = None,
        timeout_s: float | None = None,
        request_id: str = "",
    ) -> dict[str, Array]:
        """What a model answers.

        Args:
            model: its name; or an ensemble's.
            inputs: arrays by input, or what numpy makes arrays of; strings as arrays of `str`.
            version: only if it is this one that serves.
            outputs: that are wanted; all of them by default.
            priority: 1 for the most urgent to 100; 50 by default.
            timeout_s: seconds until the answer is given up.
            request_id: names it for `/feedback`.

        Returns:
            The outputs by name; they share the answer's memory and may not be written.

        Raises:
            BadRequestError: when inputs do not fit the model; it names the field.
            UnknownModelError: when the device serves no such model.
            NotReadyError: when it is not loaded, or the agent not there, all the time.
            BusyError: when too many requests wait, all the time.
            TimedOutError: when there is no answer in time.
            ModelFailedError: when the model fails on these inputs.
        """
        parts = parts_of(inputs)
        path = _path(model, version) + "/infer"
        until = self._until(timeout_s)
        again = _Again(until)
        while True:
            with self._lane(until) as lane:
                left = again.left_s()
                wish = Wish(outputs, priority, left, request_id)
                offsets = lane.place(parts, left)
                if offsets is None:
                    head = header(parts, wish)
                    body: Body = [head, *(part.content for part in parts)]
                else:
                    assert lane.memory is not None
                    head = body = header(parts, wish, region=lane.memory.name, offsets=offsets)
                headers = {
                    "Content-Type": "application/octet-stream",
                    "Inference-Header-Content-Length": str(len(head)),
                }
                reply = _ask(lane, "POST", path, body, headers, again)
                if reply is not None and offsets is not None and _forgot(reply) and lane.memory is not None:
                    lane.memory.forgotten()  # the worker started again
                    continue
            if reply is not None and reply.status == 200:
                return outputs_of(reply.body, reply.headers.get("inference-header-content-length", ""))
            again.wait(reply)

    def infer_image(
        self,
        model: str,
        image: bytes,
        *,
        version: str | None = None,
        timeout_s: float | None = None,
        request_id: str = "",
    ) -> dict[str, Array]:
        """What a model says of an image, where its version declares how images become inputs.

        Args:
            model: its name.
            image: a JPEG, PNG, WebP or BMP file.
            version: only if it is this one that serves.
            timeout_s: seconds until the answer is given up.
            request_id: names it for `/feedback`.

        Returns:
            `scores`, `classes`, and where there are any `labels` and `boxes`.

        Raises:
            InferenceError: as `infer` does.
        """
        kind = content_type(image)
        kind = kind if kind.startswith("image/") else UNKNOWN_IMAGE
        headers = {"Content-Type": kind} | ({"X-Request-ID": request_id} if request_id else {})
        reply = self._insist("POST", _path(model, version) + "/infer", image, headers, timeout_s)
        return outputs_of(reply.body, reply.headers.get("inference-header-content-length", ""))

    def metadata(self, model: str, *, timeout_s: float | None = None) -> dict[str, Any]:
        """A model's `name`, `versions`, `platform`, `inputs` and `outputs`, as the protocol has them.

        Raises:
            InferenceError: as `infer` does.
        """
        told: dict[str, Any] = msgspec.json.decode(self._insist("GET", _path(model, None), b"", {}, timeout_s).body)
        return told

    def ready(self, model: str, *, timeout_s: float = 1.0) -> bool:
        """Whether a model would answer now."""
        with self._lane(time.monotonic() + timeout_s) as lane:
            reply = _ask(lane, "GET", _path(model, None) + "/ready", b"", {}, _Again(time.monotonic() + timeout_s))
        return reply is not None and reply.status == 200

    def wait_until_ready(self, model: str, timeout_s: float = 60.0) -> None:
        """Wait until a model answers: also for one that the fleet server has yet to send.

        Raises:
            NotReadyError: when it did not in that time.
        """
        until = time.monotonic() + timeout_s
        while not self.ready(model, timeout_s=max(0.01, min(1.0, until - time.monotonic()))):
            if time.monotonic() >= until:
                raise NotReadyError(
                    f"model {model!r} was not ready within {timeout_s:g} s: `shoal device show` says why"
                )
            time.sleep(AGAIN_S)

    def _insist(self, method: str, path: str, body: bytes, headers: dict[str, str], timeout_s: float | None) -> Reply:
        until = self._until(timeout_s)
        again = _Again(until)
        while True:
            with self._lane(until) as lane:
                reply = _ask(lane, method, path, body, headers, again)
            if reply is not None and reply.status == 200:
                return reply
            again.wait(reply)

    def _until(self, timeout_s: float | None) -> float:
        return time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)

    @contextmanager
    def _lane(self, until: float) -> Iterator[_Lane]:
        lane = self._take(until)
        try:
            yield lane
        finally:
            self._free.put(lane)

    def _take(self, until: float) -> _Lane:
        try:
            return self._free.get_nowait()
        except queue.Empty:
            pass
        with self._lock:
            if self._closed:
                raise InferenceError("the client is closed")
            if len(self._lanes) < self._most:
                lane = _Lane(self._listen, self._unix_socket, shared=self._shared)
                self._lanes.append(lane)
                return lane
        try:
            return self._free.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            raise TimedOutError(f"all {self._most} connections of this client are in use") from None


class AsyncClient:
    """The same for asyncio: each call runs in a thread of its own, of as many as there are connections.

    Args:
        address: as `Client` takes it.
        connections: at most, and so requests at once.
        timeout_s: of a call that names no other.
        shared_memory: whether large inputs may go by shared memory.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        connections: int = CONNECTIONS,
        timeout_s: float = TIMEOUT_S,
        shared_memory: bool = True,
    ) -> None:
        self._client = Client(address, connections=connections, timeout_s=timeout_s, shared_memory=shared_memory)
        self._threads = ThreadPoolExecutor(connections, thread_name_prefix="shoal-client")

    async def __aenter__(self) -> Self:
        """The client."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        await self.close()

    async def close(self) -> None:
        """As `Client.close`, when the calls under way have ended."""
        await asyncio.to_thread(self._threads.shutdown)
        self._client.close()

    async def infer(self, model: str, inputs: Mapping[str, Any], **options: Any) -> dict[str, Array]:
        """As `Client.infer`."""
        return await self._run(self._client.infer, model, inputs, **options)

    async def infer_image(self, model: str, image: bytes, **options: Any) -> dict[str, Array]:
        """As `Client.infer_image`."""
        return await self._run(self._client.infer_image, model, image, **options)

    async def metadata(self, model: str, **options: Any) -> dict[str, Any]:
        """As `Client.metadata`."""
        return await self._run(self._client.metadata, model, **options)

    async def ready(self, model: str, **options: Any) -> bool:
        """As `Client.ready`."""
        return await self._run(self._client.ready, model, **options)

    async def wait_until_ready(self, model: str, timeout_s: float = 60.0) -> None:
        """As `Client.wait_until_ready`."""
        await self._run(self._client.wait_until_ready, model, timeout_s)

    async def _run(self, call: Callable[..., ValueT], *given: Any, **options: Any) -> ValueT:
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: call(*given, **options))


class _Again:
    """Whether, and when, something is asked again."""

    def __init__(self, until: float) -> None:
        self._until = until
        self._pause_s = AGAIN_S
        self._cut_off = 0
        self.trouble = ""

    def left_s(self) -> float:
        """Seconds that are left.

        Raises:
            TimedOutError: none.
        """
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimedOutError(self.trouble or "the time for it was over before it was asked")
        return left

    def failed(self, error: OSError) -> None:
        """Nobody answered.

        Raises:
            ModelFailedError: when the worker ended again and again while it had this request: it may be why.
        """
        self.trouble = f"the inference API does not answer: {str(error) or type(error).__name__}"
        self._cut_off += isinstance(error, CutOffError)
        if self._cut_off >= CUT_OFF_MOST:
            raise ModelFailedError(f"the connection ended {CUT_OFF_MOST} times while this request was under way")

    def wait(self, reply: Reply | None) -> None:
        """Wait, or give up.

        Raises:
            InferenceError: the one that says why.
        """
        said = self.trouble if reply is None else reply.said
        if reply is not None and reply.status not in {429, 503}:
            raise _error(reply)
        pause = max(self._pause_s, reply.again_after_s if reply is not None else 0.0)
        self._pause_s = min(2 * self._pause_s, AGAIN_MOST_S)
        if time.monotonic() + pause >= self._until:
            raise BusyError(said) if reply is not None and reply.status == 429 else NotReadyError(said)
        time.sleep(pause)


def _ask(lane: _Lane, method: str, path: str, body: Body, headers: dict[str, str], again: _Again) -> Reply | None:
    """The answer; None when nobody gives one, and `again` knows why.

    Raises:
        TimedOutError: when it did not come in time.
    """
    try:
        return lane.connection.ask(method, path, body, headers, again.left_s())
    except TimeoutError:
        raise TimedOutError("the answer did not come in time") from None
    except OSError as error:
        again.failed(error)
        return None


def _error(reply: Reply) -> InferenceError:
    kinds: dict[int, type[InferenceError]] = {404: UnknownModelError, 500: ModelFailedError, 504: TimedOutError}
    return kinds.get(reply.status, BadRequestError)(reply.said)


def _forgot(reply: Reply) -> bool:
    """Whether it says that a region is not registered."""
    return reply.status == 400 and "is not registered" in reply.said


def _path(model: str, version: str | None) -> str:
    path = f"/v2/models/{quote(model, safe='')}"
    return path if version is None else f"{path}/versions/{quote(version, safe='')}"


def _address(given: str | None) -> tuple[str, str]:
    """`host:port` and the path of a Unix socket, one of which is empty."""
    if given is not None:
        return ("", given.removeprefix("unix:")) if given.startswith("unix:") else (given, "")
    socket = os.environ.get("SHOAL_AGENT_UNIX_SOCKET") or (SOCKET if Path(SOCKET).exists() else "")
    return ("", socket) if socket else (os.environ.get("SHOAL_AGENT_LISTEN") or LISTEN, "")
