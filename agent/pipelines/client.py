"""Asks the device's own inference API, over its Unix socket or loopback: one request at a time on one connection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from agent.client.connection import Connection
from agent.client.http1 import Reply
from agent.pipelines.items import Answer, Item
from agent.protocol.datatypes import ARRAY_TYPES, HEADER_LENGTH_READ

BESIDE_S = 30.0  # for the way there and back, beside the inference itself
REFUSALS = (400, 413)  # what is wrong with one item; the rest is about the model, and may end


class AwayError(Exception):
    """The model does not answer now: it is to be asked again.

    Attributes:
        after_s: not earlier, in seconds.
        item: whether this very item may be the reason.
    """

    def __init__(self, message: str, *, after_s: float = 0.0, item: bool = False) -> None:
        super().__init__(message)
        self.after_s = after_s
        self.item = item


class RefusedError(Exception):
    """The model takes no such item."""


@dataclass(frozen=True)
class TensorInfo:
    """What a model says of an input: the protocol's datatype, and its shape with -1 for any size."""

    datatype: str
    shape: list[int]


@dataclass(frozen=True)
class ModelInfo:
    """What a model says of itself."""

    version: str
    inputs: Mapping[str, TensorInfo] = field(default_factory=dict)


class Client:
    """Of one model.

    Args:
        listen: `host:port` of the API.
        unix_socket: its path; empty to use `listen`.
        model: that is asked.
        hang_s: how long an inference may take; 0: for ever.
    """

    def __init__(self, listen: str, unix_socket: str, model: str, hang_s: float) -> None:
        self._path = f"/v2/models/{model}"
        self._wait_s = hang_s + BESIDE_S if hang_s else None
        self._connection = Connection(listen, unix_socket)

    def describe(self) -> ModelInfo:
        """What the model says of itself.

        Raises:
            AwayError: when it does not answer.
        """
        reply = self._ask("GET", self._path, b"", {})
        if reply.status != 200:
            raise AwayError(reply.said)
        try:
            told = msgspec.json.decode(reply.body, type=_Metadata)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise AwayError("the inference API describes the model in an unknown way") from None
        inputs = {one.name: TensorInfo(one.datatype, one.shape) for one in told.inputs}
        return ModelInfo(next(iter(told.versions), ""), inputs)

    def infer(self, item: Item) -> Answer:
        """The answer to an item.

        Raises:
            AwayError: when there is none now.
            RefusedError: when there never will be.
        """
        headers = {"Content-Type": item.content_type, **item.headers}
        reply = self._ask("POST", f"{self._path}/infer", item.body, headers)
        if reply.status in REFUSALS:
            raise RefusedError(reply.said)
        if reply.status != 200:
            raise AwayError(reply.said, after_s=reply.again_after_s, item=reply.status == 500)
        return _answer(reply.body, reply.headers.get(HEADER_LENGTH_READ, ""))

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def _ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Reply:
        try:
            return self._connection.ask(method, path, body, headers, self._wait_s)
        except OSError as error:
            raise AwayError(f"the inference API does not answer: {str(error) or type(error).__name__}") from None


class _Tensor(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]


class _Metadata(msgspec.Struct):
    versions: list[str]
    inputs: list[_Tensor]


def _answer(body: bytes | bytearray, header_length: str) -> Answer:
    """Read an answer of JSON, or of JSON with binary tensors behind it.

    Raises:
        AwayError: when it makes no sense.
    """
    length = int(header_length) if header_length.isascii() and header_length.isdigit() else len(body)
    try:
        told = msgspec.json.decode(body[:length])
        outputs = [dict(one) for one in told["outputs"]]
        arrays = _take_arrays(outputs, memoryview(body)[length:]) if length < len(body) else {}
        return Answer(str(told["model_name"]), str(told.get("model_version", "")), outputs, arrays)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, KeyError, TypeError, ValueError):
        raise AwayError("the inference API gave an answer that can't be read", item=True) from None


def _take_arrays(outputs: list[dict[str, Any]], blobs: memoryview) -> dict[str, Any]:
    """Put the binary tensors' numbers where JSON has them; the arrays by name."""
    import numpy as np

    arrays: dict[str, Any] = {}
    position = 0
    for one in outputs:
        size = one.pop("parameters", {}).get("binary_data_size")
        if size is None:
            continue
        array = np.frombuffer(blobs[position : position + size], ARRAY_TYPES[one["datatype"]]).reshape(one["shape"])
        position += size
        arrays[one["name"]] = array
        one["data"] = array.reshape(-1).tolist()
    return arrays
