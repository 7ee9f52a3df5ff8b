"""The local inference API over HTTP/1.1, parsed by httptools: the routes of the Open Inference Protocol v2."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import httptools
import msgspec

from agent import __version__
from agent.protocol.limits import LIMITS
from agent.protocol.manifest import Manifest
from agent.runtimes.base import Tensors
from agent.serving.exposure import Beside
from agent.serving.images import ImageRequest, Images, described, is_image
from agent.serving.models import LoadedModel, RetiredError, rows_of
from agent.serving.oip import BadRequestError, InferRequest, decode_request, encode_response, metadata
from agent.serving.registry import Registry
from agent.serving.waiting import DeadlineError, QueueFullError

log = logging.getLogger(__name__)
BODY_LIMIT = 64 * 1024 * 1024
HEADERS_LIMIT = 64
DIGITS = 18  # of a length that makes sense
REASONS = {
    200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 413: "Content Too Large",
    415: "Unsupported Media Type", 429: "Too Many Requests", 500: "Internal Server Error", 501: "Not Implemented",
    503: "Service Unavailable", 504: "Gateway Timeout",
}  # fmt: skip


@dataclass
class _Request:
    method: str = ""
    path: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    keep_alive: bool = True


@dataclass
class _Answer:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    then: Callable[[], None] = lambda: None  # done when it is on its way


def _json(value: Any, status: int = 200) -> _Answer:
    return _Answer(status, msgspec.json.encode(value), {"Content-Type": "application/json"})


def _error(status: int, message: str) -> _Answer:
    return _json({"error": message}, status)


def _again(status: int, message: str, after_s: float = 1.0) -> _Answer:
    """An error that need not be one if the client comes again."""
    answer = _error(status, message)
    answer.headers["Retry-After"] = str(max(1, math.ceil(after_s)))
    return answer


class Connection(asyncio.Protocol):
    """One client. Pipelined requests are answered in their order."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._request = _Request()
        self._waiting: asyncio.Queue[_Request | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has come."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._parser = httptools.HttpRequestParser(self)
        self._task = asyncio.get_running_loop().create_task(self._serve())
        self._api.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """The client has gone."""
        self._waiting.put_nowait(None)
        self._api.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        """Some bytes of requests."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._close()
        except (httptools.HttpParserError, _TooLargeError) as error:
            status = 413 if isinstance(error, _TooLargeError) else 400
            self._write(_error(status, str(error) or "not an HTTP request"), keep_alive=False)
            self._close()

    def on_message_begin(self) -> None:
        """A request begins."""
        self._request = _Request()

    def on_url(self, url: bytes) -> None:
        """A part of its path."""
        self._request.path += url.decode("latin-1")

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        if len(self._request.headers) >= HEADERS_LIMIT:
            raise _TooLargeError(f"more than {HEADERS_LIMIT} headers")
        self._request.headers[name.decode("latin-1").lower()] = value.decode("latin-1")
        if name.lower() == b"expect" and self._transport is not None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        """A part of its body."""
        if len(self._request.body) + len(body) > BODY_LIMIT:
            raise _TooLargeError(f"a body may have {BODY_LIMIT} bytes")
        self._request.body += body

    def on_message_complete(self) -> None:
        """It is whole."""
        self._request.method = self._parser.get_method().decode()
        self._request.keep_alive = self._parser.should_keep_alive()
        self._waiting.put_nowait(self._request)

    async def _serve(self) -> None:
        while (request := await self._waiting.get()) is not None:
            try:
                answer = await self._api.answer(request)
            except Exception as error:
                log.exception("answering %s failed", request.path)
                answer = _error(500, f"{type(error).__name__}: {error}")
            self._write(answer, keep_alive=request.keep_alive and not self._api.draining)
            try:
                answer.then()
            except Exception:
                log.exception("what follows on %s failed", request.path)
            if not request.keep_alive or self._api.draining:
                self._close()
                return

    def _write(self, answer: _Answer, *, keep_alive: bool) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        lines = [f"HTTP/1.1 {answer.status} {REASONS.get(answer.status, '')}", f"Content-Length: {len(answer.body)}"]
        lines += [f"{name}: {value}" for name, value in answer.headers.items()]
        lines.append(f"Connection: {'keep-alive' if keep_alive else 'close'}")
        self._transport.write("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + answer.body)

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class _TooLargeError(Exception):
    """A request has more of something than is read."""


class Api:
    """The routes."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._images = Images()
        self._copies: set[asyncio.Task[None]] = set()
        self.draining = False
        self.expected: frozenset[str] = frozenset()  # models that ought to be served
        self.connections: set[Connection] = set()

    async def answer(self, request: _Request) -> _Answer:
        """One request's answer."""
        parts = [part for part in request.path.partition("?")[0].split("/") if part]
        if parts[:1] != ["v2"]:
            return _error(404, f"there is no {request.path[:200]!r}; the API begins at /v2")
        match [request.method, *parts[1:]]:
            case ["GET"]:
                extensions = ["binary_tensor_data", "feedback", "images"]
                return _json({"name": "shoal-agent", "version": __version__, "extensions": extensions})
            case ["GET", "health", "live" | "ready"]:
                return _Answer(200)
            case ["POST", "repository", "index"]:
                return _json([self._index(name) for name in self._registry.names()])
            case [_, "models", name, "versions", version, *rest]:
                return await self._model(request, name, version, rest)
            case [_, "models", name, *rest]:
                return await self._model(request, name, None, rest)
            case _:
                return _error(404, f"there is no {request.method} {request.path[:200]!r}")

    def _index(self, name: str) -> dict[str, str]:
        model = self._registry.serving(name)
        return {"name": name, "version": model.manifest.version if model else "", "state": "READY", "reason": ""}

    async def _model(self, request: _Request, name: str, version: str | None, rest: list[str]) -> _Answer:
        model = self._registry.serving(name)
        if model is None and name in self.expected:
            return _again(503, f"model {name[:200]!r} is not loaded at the moment: come again")
        if model is None or (version is not None and version != model.manifest.version):
            running = ", ".join(self._registry.names()) or "none"
            wanted = name if version is None else f"{name} in version {version}"
            return _error(404, f"model {wanted[:200]!r} does not run here; models that do: {running}")
        match [request.method, *rest]:
            case ["GET"]:
                return _json(metadata(model.manifest) | described(model.manifest))
            case ["GET", "ready"]:
                return _Answer(200)
            case ["GET", "config"]:
                return _json({"name": name, "max_batch_size": model.manifest.max_batch})
            case ["POST", "infer"]:
                return await self._infer(request, model, split=version is None)
            case ["POST", "feedback"]:
                return self._feedback(request, name)
            case _:
                return _error(405, f"{request.method} {request.path[:200]!r} is not offered")

    async def _infer(self, request: _Request, model: LoadedModel, *, split: bool) -> _Answer:
        try:
            wanted = await self._read(request, model.manifest)
        except BadRequestError as error:
            model.recorder.rejected()
            return _error(error.status, str(error))
        except QueueFullError:
            model.recorder.rejected()
            return _again(429, "too many images wait to be decoded: send fewer, or later")
        beside = self._registry.beside(model.manifest.model)
        if beside is not None and split and beside.answers(wanted.request_id):
            answer = await self._answered_by(beside.model, request, wanted, model.manifest)
            if answer is not None:
                return answer
        try:
            outputs = await _ask(model, wanted)
            answer = await self._encode(wanted, outputs, model.manifest)
        except RetiredError:
            return await self.answer(request)  # by what serves now: it was taken out after it was looked up
        except QueueFullError as error:
            return _again(429, "too many requests wait for this model: send fewer, or later", error.retry_after_s)
        except DeadlineError:
            return _error(504, f"its turn did not come within the {wanted.timeout_s:g} s that it may wait (timeout)")
        except Exception as error:  # noqa: BLE001 (whatever the model's runtime raises, the client is told)
            return _error(500, f"the model failed: {str(error)[:500]}")
        if beside is not None:  # when it is answered: what a copy does to the process is no matter of this client
            answer.then = partial(self._copy, beside, request, wanted, outputs, model.manifest)
        return answer

    async def _read(self, request: _Request, manifest: Manifest) -> InferRequest | ImageRequest:
        """What a request's body asks of a model: tensors, or an image."""
        content_type = request.headers.get("content-type", "")
        if not is_image(content_type):
            return _decode(request, manifest)
        request_id = request.headers.get("x-request-id", "")
        return await self._images.read(bytes(request.body), content_type, request_id, manifest)

    async def _encode(self, wanted: InferRequest | ImageRequest, outputs: Tensors, manifest: Manifest) -> _Answer:
        if isinstance(wanted, ImageRequest):
            body = await self._images.answer(wanted, outputs, manifest)
            return _Answer(200, body, {"Content-Type": "application/json"})
        return _encode(wanted, outputs, manifest)

    async def _answered_by(
        self, model: LoadedModel, request: _Request, wanted: InferRequest | ImageRequest, served: Manifest
    ) -> _Answer | None:
        """An answer of a version that is tried; None when it has none: that counts as its own, and no client's loss.

        Args:
            model: the version.
            request: as it came.
            wanted: what the version that serves understands by it.
            served: manifest of that one.
        """
        mine = model.manifest
        try:
            asked = wanted if _understood_alike(mine, served) else await self._read(request, mine)
            return await self._encode(asked, await _ask(model, asked), mine)
        except BadRequestError:
            model.recorder.rejected()
            return None
        except Exception:  # noqa: BLE001 (whatever its runtime raises: the version that serves answers in its place)
            return None

    def _copy(
        self,
        beside: Beside,
        request: _Request,
        wanted: InferRequest | ImageRequest,
        outputs: Tensors,
        served: Manifest,
    ) -> None:
        """Tell a version that runs beside of a request that was answered."""
        if isinstance(wanted, ImageRequest) and beside.model.manifest.processing != served.processing:
            task = asyncio.get_running_loop().create_task(self._copy_image(beside, request, outputs))
            self._copies.add(task)
            task.add_done_callback(self._copies.discard)
            return
        beside.served(wanted.inputs, outputs, rows_of(wanted.inputs), wanted.request_id)

    async def _copy_image(self, beside: Beside, request: _Request, outputs: Tensors) -> None:
        """The same for an image that a version turns into another tensor than the one that serves."""
        try:
            asked = await self._read(request, beside.model.manifest)
        except BadRequestError:
            beside.model.recorder.rejected()
        except QueueFullError:
            pass  # as a copy for which there is no room
        else:
            beside.served(asked.inputs, outputs, 1, asked.request_id)

    def _feedback(self, request: _Request, name: str) -> _Answer:
        """Count true labels: `{"labels": [{"id": request id, "label": class index, or one a row}]}`."""
        try:
            said = msgspec.json.decode(request.body, type=_Feedback)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return _error(400, f"feedback: {error}")
        matched, unknown = 0, 0
        for one in said.labels:
            labels = one.label if isinstance(one.label, list) else [one.label]
            # More than one version knows a request that was copied: each learns how it did.
            found = max((model.feedback(one.id, labels) for model in self._registry.versions_of(name)), default=0)
            matched += found
            unknown += found == 0
        return _json({"matched_rows": matched, "unknown_ids": unknown})


def _decode(request: _Request, manifest: Manifest) -> InferRequest:
    length = request.headers.get("inference-header-content-length", "")
    header_bytes = int(length[:DIGITS]) if length.isascii() and length.isdigit() else None
    return decode_request(bytes(request.body), header_bytes, manifest)


def _encode(wanted: InferRequest, outputs: Tensors, manifest: Manifest) -> _Answer:
    body, header_length = encode_response(wanted, outputs, manifest)
    if header_length is None:
        return _Answer(200, body, {"Content-Type": "application/json"})
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(header_length)}
    return _Answer(200, body, headers)


async def _ask(model: LoadedModel, wanted: InferRequest | ImageRequest) -> Tensors:
    return await model.infer(wanted.inputs, wanted.request_id, priority=wanted.priority, timeout_s=wanted.timeout_s)


def _understood_alike(one: Manifest, other: Manifest) -> bool:
    """Whether two versions make the same of a request."""
    return (one.inputs, one.outputs, one.processing) == (other.inputs, other.outputs, other.processing)


_Index = Annotated[int, msgspec.Meta(ge=0, lt=LIMITS.counter)]  # more would be refused with the telemetry it is in


class _Label(msgspec.Struct):
    id: str
    label: _Index | list[_Index]


class _Feedback(msgspec.Struct):
    labels: list[_Label]
