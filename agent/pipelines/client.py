"""Asks the device's own inference API, over its Unix socket or loopback: one request at a time on one connection."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from agent.pipelines.items import Answer, Item

CONNECT_S = 5.0
BESIDE_S = 30.0  # for the way there and back, beside the inference itself
ANSWER_LIMIT = 64 << 20
REFUSALS = (400, 413)  # what is wrong with one item; the rest is about the model, and may end
DTYPES = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "INT8": "<i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8",
          "UINT8": "<u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "BOOL": "?"}  # fmt: skip


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
        self._listen, self._unix_socket = listen, unix_socket
        self._path = f"/v2/models/{model}"
        self._wait_s = hang_s + BESIDE_S if hang_s else None
        self._connection: http.client.HTTPConnection | None = None

    def describe(self) -> ModelInfo:
        """What the model says of itself.

        Raises:
            AwayError: when it does not answer.
        """
        status, _, body = self._ask("GET", self._path, b"", {})
        if status != 200:
            raise AwayError(_said(status, body))
        try:
            told = msgspec.json.decode(body, type=_Metadata)
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
        status, answered, body = self._ask("POST", f"{self._path}/infer", item.body, headers)
        if status in REFUSALS:
            raise RefusedError(_said(status, body))
        if status != 200:
            wait = answered.get("retry-after", "")
            after = float(wait) if wait.isascii() and wait.isdigit() and len(wait) < 6 else 0.0
            raise AwayError(_said(status, body), after_s=after, item=status == 500)
        return _answer(body, answered.get("inference-header-content-length", ""))

    def close(self) -> None:
        """End the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        while True:
            kept = self._connection is not None
            try:
                return self._once(method, path, body, headers)
            except (OSError, http.client.HTTPException) as error:
                self.close()
                # A connection that stood idle may have been closed by the other side: that is no failure.
                if not kept or isinstance(error, TimeoutError):
                    said = f"the inference API does not answer: {str(error) or type(error).__name__}"
                    raise AwayError(said) from None

    def _once(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        if self._connection is None:
            self._connection = self._connect()
        self._connection.request(method, path, body=body or None, headers=headers)
        response = self._connection.getresponse()
        content = response.read(ANSWER_LIMIT + 1)
        if len(content) > ANSWER_LIMIT:
            raise OSError(f"an answer has more than {ANSWER_LIMIT} bytes")
        if response.will_close:
            self.close()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, content

    def _connect(self) -> http.client.HTTPConnection:
        if self._unix_socket:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(CONNECT_S)
            try:
                sock.connect(self._unix_socket)
            except OSError:
                sock.close()
                raise
        else:
            sock = socket.create_connection(own_address(self._listen), timeout=CONNECT_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(self._wait_s)
        connection = http.client.HTTPConnection("localhost")
        connection.sock = sock
        return connection


def own_address(listen: str) -> tuple[str, int]:
    """Where a server that listens at `host:port` is reached from its own machine."""
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host), int(port)  # noqa: S104


class _Tensor(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]


class _Metadata(msgspec.Struct):
    versions: list[str]
    inputs: list[_Tensor]


def _said(status: int, body: bytes) -> str:
    try:
        told = msgspec.json.decode(body[:65536])
        text = str(told["error"]) if isinstance(told, dict) and "error" in told else ""
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        text = ""
    return f"the inference API answered {status}{': ' if text else ''}{text[:500]}"


def _answer(body: bytes, header_length: str) -> Answer:
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
        array = np.frombuffer(blobs[position : position + size], DTYPES[one["datatype"]]).reshape(one["shape"])
        position += size
        arrays[one["name"]] = array
        one["data"] = array.reshape(-1).tolist()
    return arrays
