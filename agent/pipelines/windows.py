"""Samples as a model takes them: windows that overlap or not, and tensors of known shapes. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from agent.pipelines.client import TensorInfo
from agent.protocol.datatypes import ARRAY_TYPES, HEADER_LENGTH

Samples = npt.NDArray[np.float32]
Array = npt.NDArray[Any]


class ShapeError(Exception):
    """What is declared does not fit the model; the message names the key."""


class Windows:
    """Windows of a stream that comes in pieces.

    Args:
        window: samples of each.
        hop: from the beginning of one to that of the next; more than a window leaves samples out.
        first: position of the first, in samples from the beginning of the stream.
    """

    def __init__(self, window: int, hop: int, first: int = 0) -> None:
        self._window, self._hop = window, hop
        self._kept: Samples = np.zeros(0, np.float32)
        self._start = 0  # position of what is kept
        self._next = first

    def feed(self, samples: Samples) -> Iterator[tuple[int, Samples]]:
        """Position and samples of each window that is whole now."""
        self._kept = np.concatenate([self._kept, samples])
        while self._next + self._window <= self._start + len(self._kept):
            offset = self._next - self._start
            position, found = self._next, self._kept[offset : offset + self._window].copy()
            self._next += self._hop
            self._drop()
            yield position, found
        self._drop()

    def _drop(self) -> None:
        """Let go of what no later window has."""
        gone = min(max(self._next - self._start, 0), len(self._kept))
        self._kept = self._kept[gone:]
        self._start += gone


def mono(data: bytes, width: int, channels: int) -> Samples:
    """PCM samples of a WAV stream as float32 from -1 to 1, the mean of their channels.

    Args:
        data: whole frames.
        width: bytes of a sample, 1 (unsigned) to 4.
        channels: samples of a frame.
    """
    if width == 1:
        values = (np.frombuffer(data, np.uint8).astype(np.float64) - 128) / 128
    elif width == 3:
        parts = np.frombuffer(data, np.uint8).reshape(-1, 3).astype(np.int32)
        whole = (parts[:, 0] | parts[:, 1] << 8 | parts[:, 2] << 16) << 8
        values = whole.astype(np.float64) / 2**31
    else:
        values = np.frombuffer(data, f"<i{width}").astype(np.float64) / 2 ** (8 * width - 1)
    mixed: Samples = values.reshape(-1, channels).mean(axis=1).astype(np.float32)
    return mixed


def window_shape(info: TensorInfo, window: int, name: str) -> list[int]:
    """The shape of an input for one window: the last size that is free takes the samples, others are 1.

    Raises:
        ShapeError: when no such shape has as many numbers.
    """
    sizes = [1 if size < 0 else size for size in info.shape]
    if info.shape and info.shape[-1] < 0:
        sizes[-1] = window
    if int(np.prod(sizes, dtype=np.int64)) != window or info.datatype != "FP32":
        raise ShapeError(
            f"the model's input {name!r} takes {info.datatype} of shape {info.shape}, which a window of {window} FP32 "
            "samples does not fill: change `window`, or name another `input`"
        )
    return sizes


def zeros(info: TensorInfo) -> Array:
    """What a state begins with."""
    return np.zeros([1 if size < 0 else size for size in info.shape], ARRAY_TYPES[info.datatype])


def constant(info: TensorInfo, value: float | Sequence[float], name: str) -> Array:
    """An input that is always the same: one number everywhere, or all of them.

    Raises:
        ShapeError: when there are too few or too many.
    """
    shape = [1 if size < 0 else size for size in info.shape]
    try:
        numbers = np.asarray(value).astype(ARRAY_TYPES[info.datatype])
        if numbers.size == 1:
            return np.full(shape, numbers.reshape(-1)[0])
        return numbers.reshape(info.shape if info.shape.count(-1) == 1 else shape)
    except (ValueError, OverflowError):
        raise ShapeError(f"constants.{name}: the model takes {info.shape} of {info.datatype}") from None


def request(tensors: Mapping[str, Array], datatypes: Mapping[str, str]) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request in the binary tensor form, that asks for such an answer."""
    blobs = {name: np.ascontiguousarray(one).tobytes() for name, one in tensors.items()}
    inputs = [
        {
            "name": name,
            "datatype": datatypes[name],
            "shape": list(one.shape),
            "parameters": {"binary_data_size": len(blobs[name])},
        }
        for name, one in tensors.items()
    ]
    head = msgspec.json.encode({"inputs": inputs, "parameters": {"binary_data_output": True}})
    return head + b"".join(blobs.values()), {HEADER_LENGTH: str(len(head))}
