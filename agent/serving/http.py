"""The routes of the local inference API, the Open Inference Protocol v2: from requests to answers, not from bytes."""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated
from urllib.parse import unquote

import msgspec

from agent import __version__
from agent.protocol.limits import LIMITS
from agent.protocol.manifest import Manifest
from agent.runtimes.base import Tensors
from agent.serving.clients import Clients
from agent.serving.exchange import Answer, Request, error_answer, json_answer
from agent.serving.extensions import NAMES, Extensions
from agent.serving.models import LoadedModel, RetiredError, rows_of
from agent.serving.oip import InferRequest, configuration, decode_request, encode_response, metadata
from agent.serving.registry import Registry
from agent.serving.shared_memory import Regions
from agent.serving.tensors import BadRequestError
from agent.serving.waiting import DeadlineError, QueueFullError

DIGITS = 18  # of a length that makes sense


class Api:
    """The routes."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._regions = Regions()
        self._extensions = Extensions(registry, self._regions)
        self.draining = False
        self.clients = Clients()

    async def answer(self, request: Request) -> Answer:
        """One request's answer."""
        parts = [part for part in request.path.partition("?")[0].split("/") if part]
        if "%" in request.path:
            parts = [unquote(part) for part in parts]
        if parts[:1] != ["v2"]:
            return error_answer(404, f"there is no {request.path[:200]!r}; the API begins at /v2")
        match [request.method, *parts[1:]]:
            case ["GET"]:
                extensions = sorted({*NAMES, "feedback"})
                return json_answer({"name": "shoal-agent", "version": __version__, "extensions": extensions})
            case ["GET", "health", "live"]:
                return json_answer({"live": True})
            case ["GET", "health", "ready"]:
                return json_answer({"live": True, "ready": True})
        extension = self._extensions.answer(request, parts[1:])
        if extension is not None:
            return extension
        match parts[1:]:
            case ["models", name, "versions", version, *rest]:
                return await self._model(request, name, version, rest)
            case ["models", name, *rest]:
                return await self._model(request, name, None, rest)
            case _:
                return error_answer(404, f"there is no {request.method} {request.path[:200]!r}")

    async def _model(self, request: Request, name: str, version: str | None, rest: list[str]) -> Answer:
        model = self._registry.serving(name)
        if model is None or (version is not None and version != model.manifest.version):
            running = ", ".join(self._registry.names()) or "none"
            wanted = name if version is None else f"{name} in version {version}"
            return error_answer(404, f"model {wanted[:200]!r} does not run here; models that do: {running}")
        match [request.method, *rest]:
            case ["GET"]:
                return json_answer(metadata(model.manifest))
            case ["GET", "ready"]:
                return json_answer({"name": name, "ready": True})
            case ["GET", "config"]:
                return json_answer(configuration(model.manifest))
            case ["GET", "stats"]:
                return self._extensions.statistics(name, version)
            case ["POST", "infer"]:
                return await self._infer(request, model, split=version is None)
            case ["POST", "feedback"]:
                return self._feedback(request, name)
            case _:
                return error_answer(405, f"{request.method} {request.path[:200]!r} is not offered")

    async def _infer(self, request: Request, model: LoadedModel, *, split: bool) -> Answer:
        try:
            wanted = self._decode(request, model.manifest)
        except BadRequestError as error:
            model.recorder.rejected()
            return error_answer(error.status, str(error))
        beside = self._registry.beside(model.manifest.model)
        if beside is not None and split and beside.answers(wanted.request_id):
            answer = await self._answered_by(beside.model, request, wanted, model.manifest)
            if answer is not None:
                return answer
        try:
            outputs = await _ask(model, wanted)
            answer = self._encode(wanted, outputs, model.manifest)
        except BadRequestError as error:  # its output has no room where it was to go
            return error_answer(error.status, str(error))
        except RetiredError:
            return await self.answer(request)  # by what serves now: it was taken out after it was looked up
        except QueueFullError as error:
            answer = error_answer(429, "too many requests wait for this model: send fewer, or later")
            answer.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
            return answer
        except DeadlineError:
            return error_answer(
                504, f"its turn did not come within the {wanted.timeout_s:g} s that it may wait (timeout)"
            )
        except Exception as error:  # noqa: BLE001 (whatever the model's runtime raises, the client is told)
            return error_answer(500, f"the model failed: {str(error)[:500]}")
        if beside is not None:  # when it is answered: what a copy does to the process is no matter of this client
            answer.then = partial(beside.served, wanted.inputs, outputs, rows_of(wanted.inputs), wanted.request_id)
        return answer

    def _decode(self, request: Request, manifest: Manifest) -> InferRequest:
        length = request.headers.get("inference-header-content-length", "")
        if length and not (length.isascii() and length.isdigit()):
            raise BadRequestError("Inference-Header-Content-Length is no number of bytes")
        header_bytes = int(length[:DIGITS]) if length else None
        return decode_request(request.body, header_bytes, manifest, self._regions if request.local else None)

    def _encode(self, wanted: InferRequest, outputs: Tensors, manifest: Manifest) -> Answer:
        body, header_length = encode_response(wanted, outputs, manifest, self._regions)
        if header_length is None:
            return Answer(200, body, {"Content-Type": "application/json"})
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(header_length)}
        return Answer(200, body, headers)

    async def _answered_by(
        self, model: LoadedModel, request: Request, wanted: InferRequest, served: Manifest
    ) -> Answer | None:
        """An answer of a version that is tried; None when it has none: that counts as its own, and no client's loss.

        Args:
            model: the version.
            request: as it came.
            wanted: what the version that serves understands by it.
            served: manifest of that one.
        """
        mine = model.manifest
        try:
            alike = mine.inputs == served.inputs and mine.outputs == served.outputs
            asked = wanted if alike else self._decode(request, mine)
            return self._encode(asked, await _ask(model, asked), mine)
        except BadRequestError:
            model.recorder.rejected()
            return None
        except Exception:  # noqa: BLE001 (whatever its runtime raises: the version that serves answers in its place)
            return None

    def _feedback(self, request: Request, name: str) -> Answer:
        """Count true labels: `{"labels": [{"id": request id, "label": class index, or one a row}]}`."""
        try:
            said = msgspec.json.decode(request.body, type=_Feedback)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return error_answer(400, f"feedback: {error}")
        matched, unknown = 0, 0
        for one in said.labels:
            labels = one.label if isinstance(one.label, list) else [one.label]
            # More than one version knows a request that was copied: each learns how it did.
            found = max((model.feedback(one.id, labels) for model in self._registry.versions_of(name)), default=0)
            matched += found
            unknown += found == 0
        return json_answer({"matched_rows": matched, "unknown_ids": unknown})


async def _ask(model: LoadedModel, wanted: InferRequest) -> Tensors:
    return await model.infer(wanted.inputs, wanted.request_id, priority=wanted.priority, timeout_s=wanted.timeout_s)


_Index = Annotated[int, msgspec.Meta(ge=0, lt=LIMITS.counter)]  # more would be refused with the telemetry it is in


class _Label(msgspec.Struct):
    id: str
    label: _Index | list[_Index]


class _Feedback(msgspec.Struct):
    labels: list[_Label]
