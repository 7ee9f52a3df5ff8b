"""Routes of Triton's extensions that concern no single inference: repository, statistics, shared memory, settings.

What runs on a device is decided by its fleet server. So a client's `load` and `unload` change nothing: `load` answers
well when the model serves, and whatever would change what runs is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from agent.serving.ensemble_routes import EnsembleRoutes
from agent.serving.exchange import Answer, Request, absent_answer, error_answer, json_answer, unreadable_answer
from agent.serving.models import LoadedModel
from agent.serving.registry import Registry
from agent.serving.shared_memory import Region, RegionError, Regions

NAMES = (
    "binary_tensor_data", "classification", "model_configuration", "model_repository", "parameters",
    "schedule_policy", "statistics", "system_shared_memory",
)  # fmt: skip
_ABSENT = {
    "cudasharedmemory": "CUDA shared memory is not offered: use system shared memory",
    "trace": "trace settings are not offered: /v2/models/stats has counts and times",
    "logging": "log settings are not offered: the agent logs to its standard error",
}
_Size = Annotated[int, msgspec.Meta(ge=0, le=(1 << 62))]


class _Register(msgspec.Struct):
    key: str
    byte_size: _Size
    offset: _Size = 0


class _Index(msgspec.Struct):
    ready: bool = False


class _Change(msgspec.Struct):
    """Of a `load` or `unload`; any parameter beyond `unload_dependents` would bring in another model."""

    parameters: dict[str, msgspec.Raw] | None = None


class Extensions:
    """The routes.

    Args:
        registry: what is loaded.
        regions: what shared memory is registered.
        ensembles: of models that are loaded.
    """

    def __init__(self, registry: Registry, regions: Regions, ensembles: EnsembleRoutes) -> None:
        self._registry = registry
        self._ensembles = ensembles
        self._regions = regions

    def answer(self, request: Request, parts: list[str]) -> Answer | None:
        """One request's answer; None where the path is none of these.

        Args:
            request: as it came.
            parts: of its path below /v2.
        """
        if parts[:1] == ["models"] and parts[-1] not in {"stats", "setting"}:
            return None  # inferences among them, which are many
        match [request.method, *parts]:
            case ["POST", "repository", "index"]:
                return self._index(request)
            case ["POST", "repository", "models", name, "load" | "unload" as change]:
                return self._change(request, name, change)
            case ["GET", "models", "stats"]:
                return _statistics(self._registry.all(), self._ensembles.statistics())
            case [_, "systemsharedmemory", *rest]:
                return self._memory(request, rest)
            case [_, "cudasharedmemory" | "trace" | "logging" as absent, *_] | [
                _,
                "models",
                _,
                "trace" as absent,
                "setting",
            ]:
                return error_answer(404, _ABSENT[absent])
            case _:
                return None

    def statistics(self, name: str, version: str | None) -> Answer:
        """What the versions of a model did that are loaded, or one of them."""
        found = [one for one in self._registry.versions_of(name) if version in {None, one.manifest.version}]
        return _statistics(found)

    def _index(self, request: Request) -> Answer:
        try:
            asked = msgspec.json.decode(request.body, type=_Index) if request.body else _Index()
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return unreadable_answer("repository index", error)
        entries = [self._entry(model) for model in self._registry.all()] + self._ensembles.entries()
        entries.sort(key=lambda entry: (entry["name"], entry["state"] != "READY", entry["version"]))
        return json_answer([entry for entry in entries if not asked.ready or entry["state"] == "READY"])

    def _entry(self, model: LoadedModel) -> dict[str, str]:
        name, serving = model.manifest.model, self._registry.serving(model.manifest.model)
        state, reason = "READY", ""
        if serving is not model:
            answers = "no version" if serving is None else f"version {serving.manifest.version}"
            state, reason = "UNAVAILABLE", f"it is loaded, and {answers} answers"
        return {"name": name, "version": model.manifest.version, "state": state, "reason": reason}

    def _change(self, request: Request, name: str, change: str) -> Answer:
        try:
            asked = msgspec.json.decode(request.body, type=_Change) if request.body else _Change()
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return unreadable_answer(change, error)
        brought = sorted(set(asked.parameters or {}) - {"unload_dependents"})
        if brought:
            said = ", ".join(brought)[:200]
            return error_answer(
                403, f"parameters: {said}: what runs here is decided by the fleet server: push it there"
            )
        of_ensemble = self._ensembles.changed(name, change)
        if of_ensemble is not None:
            return of_ensemble
        if self._registry.serving(name) is None:
            return absent_answer(name, self._registry.names())
        if change == "load":
            return Answer(200)
        return error_answer(403, f"model {name!r} runs because the fleet server wants it: roll it back there")

    def _memory(self, request: Request, rest: list[str]) -> Answer:
        if not request.local:
            return error_answer(403, "shared memory is for programs on this device alone")
        match [request.method, *rest]:
            case ["GET", "status"]:
                return json_answer([_said(region) for region in self._regions.all()])
            case ["GET", "region", name, "status"]:
                region = self._regions.get(name)
                return json_answer([_said(region)]) if region is not None else _unknown(name)
            case ["POST", "region", name, "register"]:
                return self._register(request, name)
            case ["POST", "unregister"]:
                self._regions.clear()
                return Answer(200)
            case ["POST", "region", name, "unregister"]:
                self._regions.unregister(name)
                return Answer(200)
        return error_answer(405, f"{request.method} {request.path[:200]!r} is not offered")

    def _register(self, request: Request, name: str) -> Answer:
        try:
            asked = msgspec.json.decode(request.body, type=_Register)
            region = self._regions.register(name, asked.key, asked.offset, asked.byte_size)
        except RegionError as error:
            return error_answer(error.status, str(error))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return unreadable_answer("register", error)
        return json_answer({"writable": region.writable})


def _unknown(name: str) -> Answer:
    return error_answer(404, f"region {name[:100]!r} is not registered")


def _statistics(models: list[LoadedModel], of_ensembles: Sequence[dict[str, Any]] = ()) -> Answer:
    said = [one.statistics.said(one.manifest.model, one.manifest.version) for one in models] + list(of_ensembles)
    return json_answer({"model_stats": said})


def _said(region: Region) -> dict[str, Any]:
    return {"name": region.name, "key": region.key, "offset": region.offset, "byte_size": region.size}
