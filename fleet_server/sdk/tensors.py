"""Arrays to requests of `Client.infer`, and its answers to arrays; many rows in pieces, two of which are under way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from fleet_server.domain.tensors import SIZES, Tensor, TensorError, binary_body, bytes_of_texts, read_answer, texts_of

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]
Ask = Callable[[bytes, int], tuple[bytes, int]]
PIECE_BYTES = 16 << 20
UNDER_WAY = 2
_DTYPES = {
    "bool": "BOOL",
    **{f"{sign}int{size}": f"{sign.upper()}INT{size}" for sign in ("", "u") for size in (8, 16, 32, 64)},
    **{f"float{size}": f"FP{size}" for size in (16, 32, 64)},
}
_NUMPY = {datatype: name for name, datatype in _DTYPES.items()}


@dataclass(frozen=True)
class Gathered:
    """What devices answered of one piece.

    Attributes:
        outputs: by name, rows in order.
        rows: how many.
        devices: for each that was asked its id, the rows that it answered, and why it was left out.
        reissued: parts that were sent once more.
        version: that answered.
    """

    outputs: dict[str, Array]
    rows: int
    devices: list[dict[str, Any]]
    reissued: int
    version: str


def rows_of(inputs: Arrays) -> int:
    """How many rows arrays have.

    Raises:
        ValueError: where they have different numbers, or none.
    """
    counts = {name: array.shape[0] if array.ndim else 0 for name, array in inputs.items()}
    if not counts or len(set(counts.values())) > 1 or 0 in counts.values():
        said = ", ".join(f"{name} {count}" for name, count in counts.items()) or "there are none"
        raise ValueError(f"the first axis of each array is rows, as many in each: {said}")
    return next(iter(counts.values()))


def request_of(inputs: Arrays) -> tuple[bytes, int]:
    """A request's body, and the length of its JSON.

    Raises:
        ValueError: naming an array that can't be sent.
    """
    return binary_body(
        {"parameters": {"binary_data_output": True}}, "inputs", [_tensor(name, one) for name, one in inputs.items()]
    )


def gathered(body: bytes, header_length: int, rows: int) -> Gathered:
    """An answer as arrays.

    Raises:
        ValueError: when it makes no sense.
    """
    tensors, version = read_answer(body, header_length, rows)
    said = msgspec.json.decode(body[:header_length]).get("parameters", {})
    outputs = {one.name: _array(one) for one in tensors}
    return Gathered(outputs, rows, list(said.get("devices", [])), int(said.get("reissued", 0)), version)


def in_pieces(ask: Ask, inputs: Arrays, *, piece_bytes: int = PIECE_BYTES) -> Iterator[Gathered]:
    """Ask about any number of rows; what comes is in their order, and no more than a few pieces are in memory.

    Args:
        ask: `Client.infer` for a model; called from two threads.
        inputs: by name, rows first.
        piece_bytes: of the inputs of one request.

    Raises:
        ValueError: for arrays that can't be sent.
    """
    rows = rows_of(inputs)
    size = max(1, rows * piece_bytes // max(1, sum(array.nbytes for array in inputs.values())))
    with ThreadPoolExecutor(UNDER_WAY) as pool:
        asked: deque[Future[Gathered]] = deque()
        try:
            for first in range(0, rows, size):
                if len(asked) == UNDER_WAY:
                    yield asked.popleft().result()
                piece = {name: array[first : first + size] for name, array in inputs.items()}
                asked.append(pool.submit(_ask, ask, piece))
            while asked:
                yield asked.popleft().result()
        finally:
            for one in asked:
                one.cancel()


def _ask(ask: Ask, piece: Arrays) -> Gathered:
    return gathered(*ask(*request_of(piece)), rows_of(piece))


def _tensor(name: str, array: Array) -> Tensor:
    if array.dtype.kind in "OSU":
        texts = [one if isinstance(one, bytes) else str(one).encode() for one in array.ravel().tolist()]
        return Tensor(name, "BYTES", array.shape, memoryview(bytes_of_texts(texts)))
    datatype = _DTYPES.get(array.dtype.name)
    if datatype is None:
        raise ValueError(f"{name}: arrays of {array.dtype} can't be sent: {', '.join(_DTYPES)} and texts can")
    ready = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return Tensor(name, datatype, array.shape, memoryview(ready.tobytes()))


def _array(tensor: Tensor) -> Array:
    if tensor.datatype == "BYTES":
        return np.array([one.decode(errors="replace") for one in texts_of(tensor)], dtype=str).reshape(tensor.shape)
    if tensor.datatype not in _NUMPY:
        raise TensorError(f"{tensor.name}: {tensor.datatype} ({SIZES[tensor.datatype]} bytes) has no array")
    dtype = np.dtype(_NUMPY[tensor.datatype]).newbyteorder("<")
    return np.frombuffer(tensor.data, dtype).reshape(tensor.shape)
