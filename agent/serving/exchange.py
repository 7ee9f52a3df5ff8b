"""A request and its answer, as the connection and the routes of the local inference API hand them to each other."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from agent.serving.bad_request import json_field

log = logging.getLogger(__name__)
FIELD_LIMIT = 256  # characters of a part of a field that is named
HOPS = "Shoal-Hops"  # header: how often a request was forwarded; one that was goes no further
BODY_LIMIT = 64 << 20  # bytes, as they come and when they are expanded
REASONS = {
    200: "OK", 400: "Bad Request", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed",
    408: "Request Timeout", 413: "Content Too Large", 414: "URI Too Long", 415: "Unsupported Media Type",
    429: "Too Many Requests", 431: "Request Header Fields Too Large", 500: "Internal Server Error",
    501: "Not Implemented", 503: "Service Unavailable", 504: "Gateway Timeout",
}  # fmt: skip


class Request(msgspec.Struct):
    """One that is whole.

    Attributes:
        method: of HTTP.
        path: with the query, as it came.
        headers: by name in lower case.
        body: as it came, or expanded where it was compressed.
        keep_alive: whether the client would ask more on its connection.
        local: whether it came from this device: by the Unix socket, or over loopback.
    """

    method: str = ""
    path: str = ""
    headers: dict[str, str] = {}
    body: bytes | bytearray | memoryview = b""
    keep_alive: bool = True
    local: bool = False

    @property
    def was_forwarded(self) -> bool:
        """Whether another device had no room for it."""
        return HOPS.lower() in self.headers


class Answer(msgspec.Struct):
    """What is said to one; `then` is done when it is on its way."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = {}
    then: Callable[[], None] | None = None

    def follow(self) -> None:
        """Do that; what fails in it is no matter of the client's."""
        if self.then is None:
            return
        try:
            self.then()
        except Exception:
            log.exception("what follows on an answer failed")


def json_answer(value: Any, status: int = 200) -> Answer:
    """A value as JSON."""
    return Answer(status, msgspec.json.encode(value), {"Content-Type": "application/json"})


def error_answer(status: int, message: str, field: Sequence[str] = ()) -> Answer:
    """What went wrong, as the protocol has it said; for programs beside it the field at fault, where there is one."""
    told: dict[str, Any] = {"error": message}
    if field:
        told["field"] = [part[:FIELD_LIMIT] for part in field]
    return json_answer(told, status)


def unreadable_answer(what: str, error: Exception) -> Answer:
    """A body that is not the JSON that is taken."""
    return error_answer(400, f"{what}: {error}", json_field(error))


def absent_answer(wanted: str, running: Sequence[str]) -> Answer:
    """A model is asked for that nobody serves here; those that are served."""
    others = ", ".join(running) or "none"
    return error_answer(404, f"model {wanted[:200]!r} does not run here; models that do: {others}")


def again_answer(status: int, message: str, after_s: float = 1.0) -> Answer:
    """An error that need not be one if the client comes again after a while, in seconds."""
    answer = error_answer(status, message)
    answer.headers["Retry-After"] = str(max(1, math.ceil(after_s)))
    return answer
