"""The manifest: what a device must know of an artifact to fetch, verify, load and serve it."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Protocol

import msgspec

from agent.protocol.processing import Processing


class ModelFormat(StrEnum):
    """The file format of an artifact or a source form."""

    ONNX = "onnx"
    TFLITE = "tflite"
    PT2 = "pt2"  # a program of `torch.export`


# What a runtime may be called, and an execution provider that a package's runtime says it has.
RUNTIME_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}\Z")


class RuntimeName(StrEnum):
    """The runtimes that come with the agent. Packages may bring others: `agent.runtime_registry`."""

    ONNX = "onnx"
    LITERT = "litert"
    TORCH = "torch"


class Precision(StrEnum):
    """The numeric recipe of a variant."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"
    DYNAMIC_INT8 = "dynamic-int8"  # 8-bit weights; activations are quantized as they come
    INT16 = "int16"  # 8-bit weights, 16-bit activations
    WEIGHT_INT8 = "weight-int8"  # 8-bit weights, arithmetic in floating point
    WEIGHT_INT4 = "weight-int4"


SIGNED_AT = "x-shoal-signed-at"  # a field of TUF timestamp metadata: Unix seconds by the server's clock, as it signed

# Measured on version 2.14 of tflite-runtime, the last: dynamic int8 answers wrongly without a word, and int4 can crash
# the process. Its agent refuses what is not listed, and a profile for it may not ask for more.
OLD_LITERT = "tflite-runtime"
OLD_LITERT_PRECISIONS = (Precision.FP32, Precision.INT8)


class TensorSpec(msgspec.Struct, frozen=True):
    """One input or output of a model.

    Attributes:
        name: as the local inference API shows it; that of the model's source form.
        dtype: a numpy name: `float32`, `int64`, `uint8`, …
        shape: -1 for a free dimension.
        file_name: the tensor's name inside the artifact when a converter renamed it; None when it did not.
        permutation: how the source's axes are transposed to get the file's (numpy's `transpose`), when a converter
            changed their order; None when it did not.
        example_shape: of one row that the model is known to take, in the source's axes; None when there was none. A
            warm-up needs it: not every net takes free dimensions of 1.
        example_value: of an input without axes, such as a sampling rate.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file_name: str | None = None
    permutation: tuple[int, ...] | None = None
    example_shape: tuple[int, ...] | None = None
    example_value: float | None = None


class Content(Protocol):
    """Bytes that come over the wire in chunks, whatever they are."""

    @property
    def digest(self) -> str:
        """SHA-256, lower-case hexadecimal."""
        ...

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    @property
    def chunk_size(self) -> int:
        """Bytes of every chunk but the last."""
        ...


def chunk_count(content: Content) -> int:
    """How many chunks there are: the last may be short."""
    return -(-content.size // content.chunk_size)


class DataFile(msgspec.Struct, frozen=True):
    """A data set (`.npz`) that a device fetches like an artifact: digest, bytes, and bytes of a chunk."""

    digest: str
    size: int
    chunk_size: int


class Encoding(msgspec.Struct, frozen=True):
    """One way the bytes of an artifact may travel. It is fetched like an artifact, and decoded into it.

    It is not signed: whatever it makes must have the digest of the signed manifest.

    Attributes:
        codec: how it is decoded (`agent.protocol.delta`); a device ignores an encoding whose codec it does not know.
        digest: SHA-256 of what travels.
        size: bytes that travel.
        chunk_size: bytes of every chunk but the last.
        base: digest of the artifact that decoding needs; empty when it needs none.
    """

    codec: str
    digest: str
    size: int
    chunk_size: int
    base: str = ""


class Scheduling(msgspec.Struct, frozen=True):
    """How a device answers the requests for a model.

    Attributes:
        queue_limit: requests that may wait; more are refused.
        latency_target_ms: how long a request ought to take at most: no batch is made that takes longer. 0: no bound.
        batch_wait_ms: how long a request may wait for others to be answered with; 0: it never waits for company.
        cores: processors that run it, by number; empty for all.
        gpu_memory_mb: what it may take of a GPU's memory, in MiB; 0: as much as it asks for.
    """

    queue_limit: int = 1024
    latency_target_ms: float = 0.0
    batch_wait_ms: float = 0.0
    cores: tuple[int, ...] = ()
    gpu_memory_mb: int = 0


class Manifest(msgspec.Struct, frozen=True):
    """One artifact and how to run it. Its JSON is what is signed (a TUF target), and it pins the artifact's bytes.

    Attributes:
        digest: SHA-256 of the artifact, lower-case hexadecimal: its name everywhere.
        size: bytes.
        chunk_size: bytes of every chunk but the last.
        model: the model's name.
        version: the model's version.
        variant_id: the server's id of this variant.
        profile: the profile it was built for.
        format: of the file.
        runtime: that loads it: a `RuntimeName`, or the name of one that a package brings.
        precision: its numeric recipe.
        inputs: in the order the model takes them.
        outputs: in the order the model gives them.
        providers: execution providers to try, in order; the first that proves itself by an inference runs.
        threads: intra-op threads.
        max_batch: the largest batch worth making of waiting requests; 1 where the batch dimension is fixed.
        labels: class names by index, where the pusher gave them.
        provider_options: of an execution provider, by its name: what ONNX Runtime takes as its options.
        golden: rows and what this artifact answered to them when it was built (`agent.trial.golden`): a device that
            gets other answers does not let it serve. None where there are none.
        scheduling: how requests for it are answered.
        processing: how an image becomes its input and its outputs an answer, in the source's axes; None where none was
            declared, and tensors alone are taken.
    """

    digest: str
    size: int
    chunk_size: int
    model: str
    version: str
    variant_id: str
    profile: str
    format: ModelFormat
    runtime: str
    precision: Precision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    providers: tuple[str, ...] = ()
    threads: int = 1
    max_batch: int = 1
    labels: tuple[str, ...] = ()
    provider_options: dict[str, dict[str, str]] = {}
    golden: DataFile | None = None
    scheduling: Scheduling = Scheduling()
    processing: Processing | None = None

    @property
    def target_path(self) -> str:
        """The manifest's TUF target path, when it is one of a variant: `{model}/{version}/{variant_id}.json`."""
        return f"{self.model}/{self.version}/{self.variant_id}.json"

    @property
    def trial_path(self) -> str:
        """Its TUF target path, when it is one of a candidate that is only to be measured."""
        return f"trials/{self.variant_id}.{self.digest}.json"

    @property
    def contents(self) -> tuple[Content, ...]:
        """What a device fetches before it runs it: the artifact, and golden inputs where there are any."""
        return (self,) if self.golden is None else (self, self.golden)

    @property
    def chunks(self) -> int:
        """How many chunks the artifact has: the last may be short."""
        return chunk_count(self)

    @property
    def platform(self) -> str:
        """What runs it, as the inference protocol has it said."""
        return f"{self.runtime}_{self.precision.value}"

    @property
    def row_by_row(self) -> bool:
        """Whether the file takes exactly one row at a time: more are run one after another and answered together."""
        return all(spec.shape[:1] == (1,) for spec in (*self.inputs, *self.outputs))

    @property
    def fixed_rows(self) -> int:
        """How many rows a request must have, where the file takes no other number; 0 for any number."""
        sizes = {spec.shape[:1] for spec in (*self.inputs, *self.outputs)}
        size = next(iter(sizes)) if len(sizes) == 1 else ()
        return size[0] if size and size[0] > 1 else 0


def manifest_bytes(manifest: Manifest) -> bytes:
    """A manifest as JSON: what is signed, and sent as it was signed. The same manifest gives the same bytes."""
    return msgspec.json.encode(manifest)
