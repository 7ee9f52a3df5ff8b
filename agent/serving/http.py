"""The routes of the local inference API, the Open Inference Protocol v2: from requests to answers, not from bytes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated
from urllib.parse import unquote

import msgspec

from agent import __version__
from agent.protocol.limits import LIMITS
from agent.serving.buffers import Buffers
from agent.serving.clients import Clients
from agent.serving.descriptions import configuration, metadata
from agent.serving.ensemble_routes import EnsembleRoutes
from agent.serving.ensembles import Ensembles
from agent.serving.exchange import (
    Answer,
    Request,
    absent_answer,
    again_answer,
    error_answer,
    json_answer,
    unreadable_answer,
)
from agent.serving.extensions import NAMES, Extensions
from agent.serving.images import described
from agent.serving.inferring import Inferring
from agent.serving.metrics import metrics_text
from agent.serving.models import LoadedModel, RetiredError
from agent.serving.registry import Registry
from agent.serving.shared_memory import Regions
from agent.telemetry.exposition import CONTENT_TYPE
from agent.telemetry.figures import SupervisorFigures

if TYPE_CHECKING:  # at run time only where requests are forwarded
    from agent.serving.balancing.lan import Lan


class Api:
    """The routes."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.buffers = Buffers()
        self._regions = Regions(self.buffers)
        self.expected: frozenset[str] = frozenset()  # models that ought to be served
        self.ensembles = Ensembles(registry, lambda: self.expected)
        self._ensemble_routes = EnsembleRoutes(self.ensembles, self._regions)
        self._extensions = Extensions(registry, self._regions, self._ensemble_routes)
        self.inferring = Inferring(registry, self._regions)
        self.lan: Lan | None = None
        self.draining = False
        self.ask_supervisor: Callable[[], Awaitable[SupervisorFigures | None]] = _nobody
        self.clients = Clients()

    async def answer(self, request: Request) -> Answer:
        """One request's answer."""
        parts = _parts(request.path)
        if parts == ["metrics"] and request.method == "GET":
            figures = await self.ask_supervisor()
            return Answer(200, metrics_text(self._registry, figures, self.lan), {"Content-Type": CONTENT_TYPE})
        if parts[:1] != ["v2"]:
            return error_answer(404, f"there is no {request.path[:200]!r}; the API begins at /v2")
        match [request.method, *parts[1:]]:
            case ["GET"]:
                extensions = sorted({*NAMES, "feedback", "images"})
                return json_answer({"name": "shoal-agent", "version": __version__, "extensions": extensions})
            case ["GET", "health", "live" | "ready" as asked]:
                return json_answer({"live": True} | ({"ready": True} if asked == "ready" else {}))
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

    def answer_soon(self, request: Request, say: Callable[[Answer | None], None], *, alone: bool) -> bool:
        """An inference's answer, by the shortest way; see `agent.serving.connection.Application`."""
        if request.method != "POST":
            return False
        route = _infer_route(request.path)
        if route is None:
            return False
        name, version = route
        model = self._registry.serving(name)
        if model is None or self.ensembles.get(name) is not None:
            return False
        if version is not None and version != model.manifest.version:
            return False
        return self.inferring.answer_soon(request, model, say, alone=alone)

    async def _model(self, request: Request, name: str, version: str | None, rest: list[str]) -> Answer:
        model, ensemble = self._registry.serving(name), self.ensembles.get(name)
        if ensemble is not None:
            try:
                return await self._ensemble_routes.answer(request, ensemble, version, rest)
            except RetiredError:
                return await self.answer(request)  # read by what its models take now
        if model is None and name in self.expected:
            return again_answer(503, f"model {name[:200]!r} is not loaded at the moment: come again")
        if model is None or (version is not None and version != model.manifest.version):
            wanted = name if version is None else f"{name} in version {version}"
            others = [*self._registry.names(), *(one.config.name for one in self.ensembles.all())]
            return absent_answer(wanted, others)
        try:
            return await self._of(model, request, version, rest)
        except RetiredError:
            return await self.answer(request)  # by what serves now: it was taken out after it was looked up

    async def _of(self, model: LoadedModel, request: Request, version: str | None, rest: list[str]) -> Answer:
        """What is asked of a model that serves."""
        name = model.manifest.model
        match [request.method, *rest]:
            case ["GET"]:
                return json_answer(metadata(model.manifest) | described(model.manifest))
            case ["GET", "ready"]:
                return json_answer({"name": name, "ready": True})
            case ["GET", "config"]:
                return json_answer(configuration(model.manifest))
            case ["GET", "stats"]:
                return self._extensions.statistics(name, version)
            case ["POST", "infer"]:
                return await self.inferring.answer(request, model, split=version is None)
            case ["POST", "feedback"]:
                return self._feedback(request, name)
            case _:
                return error_answer(405, f"{request.method} {request.path[:200]!r} is not offered")

    def _feedback(self, request: Request, name: str) -> Answer:
        """Count true labels: `{"labels": [{"id": request id, "label": class index, or one a row}]}`."""
        try:
            said = msgspec.json.decode(request.body, type=_Feedback)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return unreadable_answer("feedback", error)
        matched, unknown = 0, 0
        for one in said.labels:
            labels = one.label if isinstance(one.label, list) else [one.label]
            # More than one version knows a request that was copied: each learns how it did.
            found = max((model.feedback(one.id, labels) for model in self._registry.versions_of(name)), default=0)
            matched += found
            unknown += found == 0
        return json_answer({"matched_rows": matched, "unknown_ids": unknown})


@lru_cache(maxsize=64)
def _infer_route(path: str) -> tuple[str, str | None] | None:
    """The model, and the version, that are asked to infer; None where something else is asked."""
    match _parts(path):
        case ["v2", "models", name, "infer"]:
            return name, None
        case ["v2", "models", name, "versions", version, "infer"]:
            return name, version
        case _:
            return None


def _parts(path: str) -> list[str]:
    parts = [part for part in path.partition("?")[0].split("/") if part]
    return [unquote(part) for part in parts] if "%" in path else parts


async def _nobody() -> SupervisorFigures | None:
    return None


_Index = Annotated[int, msgspec.Meta(ge=0, lt=LIMITS.counter)]  # more would be refused with the telemetry it is in


class _Label(msgspec.Struct):
    id: str
    label: _Index | list[_Index]


class _Feedback(msgspec.Struct):
    labels: list[_Label]
