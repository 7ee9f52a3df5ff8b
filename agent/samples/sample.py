"""One sample: a row that a model was asked, and what it answered; as messages and files have it."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import msgspec

MAGIC = b"shoal sample 1\n"
_SUM = struct.Struct("<I")


class SampleTensor(msgspec.Struct, frozen=True):
    """A tensor of one row.

    Attributes:
        name: in the manifest.
        datatype: of the Open Inference Protocol: `FP32`, `INT64`, `BYTES`, …
        shape: of the row, the axis of rows (1) first.
        data: little-endian; of BYTES each text in UTF-8 behind its length (four bytes, little-endian).
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes


class Sample(msgspec.Struct, frozen=True):
    """One row.

    Attributes:
        model: its name.
        version: its version.
        digest: of the artifact that answered.
        at: when, in Unix seconds by the device's clock.
        confidence: of the answer, 0 to 1 (`agent.telemetry.sketches.top_confidence`).
        key: see `agent.samples.reservoir`.
        inputs: what was asked.
        outputs: what was answered.
    """

    model: str
    version: str
    digest: str
    at: float
    confidence: float
    key: float
    inputs: tuple[SampleTensor, ...]
    outputs: tuple[SampleTensor, ...]

    @property
    def bytes(self) -> int:
        """Of its tensors."""
        return sum(len(one.data) for one in (*self.inputs, *self.outputs))


def packed(sample: Sample) -> bytes:
    """A sample as the bytes of its file."""
    body = msgspec.msgpack.encode(sample)
    return MAGIC + _SUM.pack(zlib.crc32(body)) + body


def read_sample(path: Path) -> Sample:
    """The sample in a file.

    Raises:
        ValueError: when the file is none, or only a part of one.
        OSError: when it can't be read.
    """
    content = path.read_bytes()
    start = len(MAGIC) + _SUM.size
    body = content[start:]
    if not content.startswith(MAGIC) or content[len(MAGIC) : start] != _SUM.pack(zlib.crc32(body)):
        raise ValueError(f"{path} is no whole sample")
    try:
        return msgspec.msgpack.decode(body, type=Sample)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path} is no sample as this agent writes them: {error}") from None
