"""Calls as the HTTP side has them: each method's message becomes a request of its routes, the answer its message."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import msgspec
from google.protobuf import json_format
from google.protobuf.message import DecodeError

from agent.protocol.datatypes import HEADER_LENGTH_READ
from agent.serving.bad_request import BadRequestError
from agent.serving.exchange import Answer, Request
from agent.serving.rpc import wire
from agent.serving.rpc.inference import request_body, response_message
from agent.serving.rpc.schema import methods

NAME_LIMIT = 255  # characters of a model, a version or a region
KEY_LIMIT = 4096
_HTTP_ONLY = frozenset({"binary_tensor_data", "feedback", "images"})


@dataclass(frozen=True)
class Caller:
    """Who calls.

    Attributes:
        local: whether from this device.
        remaining_s: until its deadline, in seconds; None where it has none.
    """

    local: bool
    remaining_s: float | None = None


class Method:
    """One method.

    Args:
        name: of the service.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._request_class, self._answer_class = methods()[name]

    def request(self, raw: bytes, caller: Caller) -> Request:
        """What the routes are asked.

        Raises:
            BadRequestError: when the message is not one, or is too large; it names the field.
        """
        if self.name == "ModelInfer":
            wire.check(raw)
        elif len(raw) > wire.UNSEEN:
            raise BadRequestError(f"a message of {self.name} may have {wire.UNSEEN} bytes, and this one has {len(raw)}")
        try:
            message = self._request_class.FromString(raw)
        except DecodeError:
            raise wire.malformed() from None
        request = _REQUESTS[self.name](message, caller)
        request.local = caller.local
        return request

    def answer(self, answer: Answer) -> bytes:
        """The message that says what the routes answered, where that went well."""
        if self.name == "ModelInfer":
            return bytes(response_message(answer).SerializeToString())
        said = _SHAPES.get(self.name, _as_it_is)(msgspec.json.decode(answer.body) if answer.body else {})
        message = json_format.ParseDict(said, self._answer_class(), ignore_unknown_fields=True)
        return bytes(message.SerializeToString())


def _as_it_is(said: Any) -> Any:
    return said


def _get(*parts: str) -> Callable[[Any, Caller], Request]:
    return lambda _message, _caller: Request("GET", _path(*parts))


def _of_model(*rest: str) -> Callable[[Any, Caller], Request]:
    return lambda message, _caller: Request("GET", _model(message.name, message.version, *rest))


def _model(name: str, version: str, *rest: str, field: str = "name") -> str:
    parts = ["models", _bounded(field, name)]
    if version:
        parts += ["versions", _bounded("version", version)]
    return _path(*parts, *rest)


def _bounded(field: str, text: str, most: int = NAME_LIMIT) -> str:
    if not 0 < len(text) <= most:
        raise BadRequestError(f"{field}: it has {len(text)} characters: 1 to {most} are taken")
    return text


def _path(*parts: str) -> str:
    return "/".join(["/v2", *(quote(part, safe="") for part in parts)])


def _infer(message: Any, caller: Caller) -> Request:
    path = _model(message.model_name, message.model_version, "infer", field="model_name")
    body, length = request_body(message, caller.remaining_s)
    headers = {HEADER_LENGTH_READ: str(length), "x-request-id": message.id}
    return Request("POST", path, headers, body)


def _statistics(message: Any, _caller: Caller) -> Request:
    if not message.name:
        return Request("GET", _path("models", "stats"))
    return Request("GET", _model(message.name, message.version, "stats"))


def _index(message: Any, _caller: Caller) -> Request:
    return Request("POST", _path("repository", "index"), body=msgspec.json.encode({"ready": message.ready}))


def _change(change: str) -> Callable[[Any, Caller], Request]:
    def request(message: Any, _caller: Caller) -> Request:
        path = _path("repository", "models", _bounded("model_name", message.model_name), change)
        return Request("POST", path, body=msgspec.json.encode({"parameters": dict.fromkeys(message.parameters)}))

    return request


def _region(message: Any, *rest: str) -> str:
    """The path of a region; of all of them where none is named."""
    named = ["region", _bounded("name", message.name)] if message.name else []
    return _path("systemsharedmemory", *named, *rest)


def _register(message: Any, _caller: Caller) -> Request:
    _bounded("name", message.name)
    asked = {
        "key": _bounded("key", message.key, KEY_LIMIT),
        "offset": message.offset,
        "byte_size": message.byte_size,
    }
    return Request("POST", _region(message, "register"), body=msgspec.json.encode(asked))


_REQUESTS: dict[str, Callable[[Any, Caller], Request]] = {
    "ServerLive": _get("health", "live"),
    "ServerReady": _get("health", "ready"),
    "ServerMetadata": _get(),
    "ModelReady": _of_model("ready"),
    "ModelMetadata": _of_model(),
    "ModelConfig": _of_model("config"),
    "ModelInfer": _infer,
    "ModelStatistics": _statistics,
    "RepositoryIndex": _index,
    "RepositoryModelLoad": _change("load"),
    "RepositoryModelUnload": _change("unload"),
    "SystemSharedMemoryStatus": lambda message, _caller: Request("GET", _region(message, "status")),
    "SystemSharedMemoryRegister": _register,
    "SystemSharedMemoryUnregister": lambda message, _caller: Request("POST", _region(message, "unregister")),
}
_SHAPES: dict[str, Callable[[Any], Any]] = {  # where the message is not the JSON that HTTP answers
    "ServerMetadata": lambda said: said | {"extensions": [one for one in said["extensions"] if one not in _HTTP_ONLY]},
    "ModelConfig": lambda said: {"config": said},
    "RepositoryIndex": lambda said: {"models": said},
    "SystemSharedMemoryStatus": lambda said: {"regions": {one["name"]: one for one in said}},
}
METHODS = tuple(_REQUESTS)
