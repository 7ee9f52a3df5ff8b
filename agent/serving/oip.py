"""Open Inference Protocol v2 bodies, with Triton's extensions for binary tensors, classification and shared memory.

Requests to arrays, and arrays to answers. No HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Protocol

import msgspec
import numpy as np

from agent.protocol.datatypes import HEADER_LENGTH
from agent.protocol.manifest import TensorSpec
from agent.runtimes.base import Array, Tensors
from agent.serving.bad_request import BadRequestError, json_field
from agent.serving.classification import CLASSES_LIMIT, top_classes
from agent.serving.descriptions import Described, shape_of
from agent.serving.tensors import Bytes, datatype, from_binary, from_json, name_of, to_binary, to_json
from agent.serving.waiting import DEFAULT, HIGHEST, LOWEST

LONGEST_US = 86_400_000_000
JSON_LIMIT = 16 << 20  # bytes: what is made of JSON takes up to sixteen times as many
ID_LIMIT = 256  # characters: ids are remembered until feedback comes


class Memory(Protocol):
    """Shared memory that tensors may lie in; see `agent.serving.shared_memory`."""

    def read(self, region: str, offset: int, size: int) -> Bytes:
        """Some bytes of a region."""
        ...

    def check(self, region: str, offset: int, size: int) -> None:
        """Refuse what does not lie in a region."""
        ...

    def write(self, region: str, offset: int, content: bytes) -> None:
        """Put bytes into a region."""
        ...


@dataclass(frozen=True)
class Span:
    """Where a tensor lies: bytes of a region of shared memory."""

    region: str
    offset: int
    size: int


@dataclass(frozen=True)
class Wanted:
    """One output that is to be answered.

    Attributes:
        name: of the output.
        binary: whether as bytes behind the JSON part.
        classes: how many of the largest numbers are wanted, with their index and label; 0 for the tensor as it is.
        span: of shared memory, where it is to be put instead.
    """

    name: str
    binary: bool = False
    classes: int = 0
    span: Span | None = None


class InferRequest(msgspec.Struct, frozen=True):
    """A decoded request: arrays by input name, and which outputs are wanted, and how.

    Attributes:
        request_id: the client's.
        inputs: by name.
        outputs: in the order they are answered in.
        spans: of the inputs that lie in shared memory, where.
        priority: 1 for the most urgent to 100; 50 where the client says nothing.
        timeout_s: how long it may wait for its turn, in seconds; 0 for as long as it takes.
    """

    request_id: str
    inputs: Tensors
    outputs: list[Wanted]
    spans: dict[str, Span]
    priority: int = DEFAULT
    timeout_s: float = 0.0


class _TensorParameters(msgspec.Struct):
    binary_data_size: int | None = None
    binary_data: bool | None = None
    classification: int | None = None
    shared_memory_region: str | None = None
    shared_memory_byte_size: int | None = None
    shared_memory_offset: int | None = None


class _Input(msgspec.Struct):
    name: str
    datatype: str
    shape: Annotated[list[int], msgspec.Meta(max_length=32)]
    parameters: _TensorParameters | None = None
    data: msgspec.Raw = msgspec.Raw()


class _Output(msgspec.Struct):
    name: str
    parameters: _TensorParameters | None = None


class _Parameters(msgspec.Struct):
    binary_data_output: bool | None = None
    priority: int | None = None
    timeout: int | None = None


class _Body(msgspec.Struct):
    inputs: list[_Input]
    id: Annotated[str, msgspec.Meta(max_length=ID_LIMIT)] | int | None = None
    outputs: list[_Output] | None = None
    parameters: _Parameters | None = None


_DECODER = msgspec.json.Decoder(_Body)
_NOTHING, _NOTHING_SAID = _TensorParameters(), _Parameters()
_SIZE = ("parameters", "binary_data_size")
_PLACE = ("parameters", "shared_memory_byte_size")
_CLASSES = ("parameters", "classification")


def decode_request(
    body: Bytes, header_length: int | None, manifest: Described, memory: Memory | None = None
) -> InferRequest:
    """Read an infer request.

    Args:
        body: of the HTTP request.
        header_length: of the JSON part, where binary tensors follow it.
        manifest: of the model that will answer.
        memory: shared memory; None for a client that may use none.

    Raises:
        BadRequestError: saying what does not fit.
    """
    length = len(body) if header_length is None else header_length
    if not 0 <= length <= len(body):
        raise BadRequestError(f"{HEADER_LENGTH} is larger than the body", HEADER_LENGTH)
    if length > JSON_LIMIT:
        raise BadRequestError(f"the body has {length} bytes of JSON, and may have {JSON_LIMIT}: send binary tensors")
    try:
        header = _DECODER.decode(memoryview(body)[:length])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequestError(f"the body is no request in JSON: {error}", *json_field(error)) from None
    inputs, spans, end = _inputs(header, memoryview(body), length, manifest, memory)
    if end != len(body):
        raise BadRequestError(f"the body has {len(body) - end} bytes that no input claims")
    request_id = "" if header.id is None else str(header.id)[:ID_LIMIT]
    return InferRequest(request_id, inputs, _wanted(header, manifest, memory), spans, *_urgency(header))


def read_span(memory: Memory | None, span: Span) -> Bytes:
    """The bytes of an input in shared memory.

    Raises:
        BadRequestError: when they are not there.
    """
    with _at_region():
        return _usable(memory).read(span.region, span.offset, span.size)


def check_span(memory: Memory | None, span: Span) -> None:
    """Refuse an output in shared memory for which there is no room.

    Raises:
        BadRequestError: then.
    """
    with _at_region():
        _usable(memory).check(span.region, span.offset, span.size)


def _inputs(
    header: _Body, body: memoryview, position: int, manifest: Described, memory: Memory | None
) -> tuple[Tensors, dict[str, Span], int]:
    """The input tensors, which of them lie elsewhere, and where their bytes in the body end, from `position` on."""
    specs = {spec.name: spec for spec in manifest.inputs}
    inputs: Tensors = {}
    spans: dict[str, Span] = {}
    for tensor in header.inputs:
        if tensor.name not in specs:
            raise BadRequestError(
                f"inputs: the model has no input {tensor.name[:100]!r}, but {', '.join(specs)}", "inputs", tensor.name
            )
        if tensor.name in inputs:
            raise BadRequestError(f"inputs: {tensor.name!r} is there twice", "inputs", tensor.name)
        try:
            size = _binary_size(tensor)
            raw = None if size is None else body[position : position + size]
            position += size or 0
            span = _span(f"input {tensor.name!r}", tensor.parameters or _NOTHING)
            if span is not None:
                spans[tensor.name] = span
            inputs[tensor.name] = _tensor(specs[tensor.name], tensor, raw, span, memory, any_rows=manifest.row_by_row)
        except BadRequestError as error:
            raise error.within("inputs", tensor.name) from None
    missing = sorted(set(specs) - set(inputs))
    if missing:
        raise BadRequestError(f"inputs: {', '.join(missing)} is missing", "inputs", missing[0])
    if manifest.row_by_row and len({array.shape[0] for array in inputs.values()}) > 1:
        rows = {name: array.shape[0] for name, array in inputs.items()}
        raise BadRequestError(f"inputs: they have different numbers of rows: {rows}", "inputs")
    return inputs, spans, position


def _urgency(header: _Body) -> tuple[int, float]:
    """Priority, and how long a request may wait in seconds, as Triton's scheduling parameters say them."""
    said = header.parameters or _NOTHING_SAID
    priority, timeout_us = said.priority or 0, said.timeout or 0
    if not 0 <= priority <= LOWEST:
        raise BadRequestError(
            f"parameters: priority is from {HIGHEST}, the most urgent, to {LOWEST}; without it, or with 0, {DEFAULT}",
            "parameters",
            "priority",
        )
    if not 0 <= timeout_us <= LONGEST_US:
        late = f"parameters: timeout is how many microseconds it may wait: 0 to {LONGEST_US}"
        raise BadRequestError(late, "parameters", "timeout")
    return priority or DEFAULT, timeout_us / 1e6


def _binary_size(tensor: _Input) -> int | None:
    size = (tensor.parameters or _NOTHING).binary_data_size
    if size is not None and not 0 <= size < 1 << 62:
        raise BadRequestError(f"inputs: binary_data_size of {tensor.name!r} is not a size", *_SIZE)
    return size


def _tensor(
    spec: TensorSpec,
    tensor: _Input,
    raw: Bytes | None,
    span: Span | None,
    memory: Memory | None,
    *,
    any_rows: bool,
) -> Array:
    if tensor.datatype != datatype(spec.dtype):
        raise BadRequestError(
            f"input {spec.name!r} has datatype {tensor.datatype[:100]!r}, the model takes {datatype(spec.dtype)}",
            "datatype",
        )
    shape = tensor.shape
    if not all(0 < size < 1 << 31 for size in shape):
        raise BadRequestError(f"input {spec.name!r} has no usable shape: {str(shape)[:100]}", "shape")
    taken = shape_of(spec, any_rows=any_rows)
    if len(shape) != len(taken) or not all(w in {-1, g} for w, g in zip(taken, shape, strict=True)):
        raise BadRequestError(f"input {spec.name!r} has shape {shape}, the model takes {taken} (-1: any)", "shape")
    data = bytes(tensor.data)
    data = b"" if data == b"null" else data
    if (raw is not None) + (span is not None) + bool(data) != 1:
        raise BadRequestError(
            f"input {spec.name!r}: its data comes by one of `data`, binary_data_size and shared_memory_region",
            "data",
        )
    if span is not None:
        raw = read_span(memory, span)
    return from_json(spec, data, shape) if raw is None else from_binary(spec, raw, shape)


def _span(what: str, parameters: _TensorParameters) -> Span | None:
    if parameters.shared_memory_region is None:
        return None
    offset, size = parameters.shared_memory_offset or 0, parameters.shared_memory_byte_size
    if size is None or not (0 <= offset < 1 << 62 and 0 < size < 1 << 62):
        raise BadRequestError(
            f"{what}: shared_memory_byte_size and shared_memory_offset are no part of a region", *_PLACE
        )
    return Span(parameters.shared_memory_region, offset, size)


def _usable(memory: Memory | None) -> Memory:
    if memory is None:
        raise BadRequestError("shared_memory_region: shared memory is for programs on this device alone")
    return memory


@contextmanager
def _at_region() -> Iterator[None]:
    """Say of an error where a request names a region."""
    try:
        yield
    except BadRequestError as error:
        raise error.within("parameters", "shared_memory_region") from None


def _wanted(header: _Body, manifest: Described, memory: Memory | None) -> list[Wanted]:
    names = [spec.name for spec in manifest.outputs]
    binary = bool((header.parameters or _NOTHING_SAID).binary_data_output)
    if not header.outputs:
        return [Wanted(name, binary) for name in names]
    wanted: dict[str, Wanted] = {}
    for output in header.outputs:
        name = output.name
        if name not in names:
            raise BadRequestError(
                f"outputs: the model has no output {name[:100]!r}, but {', '.join(names)}", "outputs", name
            )
        if name in wanted:
            raise BadRequestError(f"outputs: {name!r} is asked for twice", "outputs", name)
        try:
            wanted[name] = _one_wanted(name, output.parameters or _NOTHING, memory, binary=binary)
        except BadRequestError as error:
            raise error.within("outputs", name) from None
    return list(wanted.values())


def _one_wanted(name: str, own: _TensorParameters, memory: Memory | None, *, binary: bool) -> Wanted:
    span, classes = _span(f"output {name!r}", own), own.classification or 0
    if not 0 <= classes <= CLASSES_LIMIT:
        said = f"output {name!r}: classification is how many classes: 1 to {CLASSES_LIMIT}"
        raise BadRequestError(said, *_CLASSES)
    if span is not None:
        if classes:
            raise BadRequestError(f"output {name!r}: a classification is not put into shared memory", *_CLASSES)
        check_span(memory, span)
    return Wanted(name, binary if own.binary_data is None else own.binary_data, classes, span)


def encode_response(
    request: InferRequest, outputs: Tensors, manifest: Described, memory: Memory | None = None
) -> tuple[bytes, int | None]:
    """The body of an answer, and the length of its JSON part when binary tensors follow it.

    Outputs that go into shared memory are put there.

    Raises:
        BadRequestError: when an output does not fit where it is to go, or has no classes.
    """
    told: list[_Told] = []
    in_json, blobs = [], []
    for wanted in request.outputs:
        array = np.asarray(outputs[wanted.name], order="C")  # np.ascontiguousarray makes a row of a scalar
        if wanted.classes:
            array = _classes(wanted, array, manifest)
        size = None
        if wanted.span is not None:
            blob = to_binary(array)
            _put(wanted.name, wanted.span, blob, _usable(memory))
            size = len(blob)
        elif wanted.binary:
            blobs.append(to_binary(array))
            size = len(blobs[-1])
        else:
            in_json.append((len(told), to_json(array)))
        told.append((wanted.name, array.dtype, array.shape, size, wanted.span))
    if in_json or request.request_id:
        answer = _header(manifest.model, manifest.version, told)
        for number, values in in_json:
            answer["outputs"][number]["data"] = values
        if request.request_id:
            answer["id"] = request.request_id
        header = msgspec.json.encode(answer)
    else:
        header = _known_header(manifest.model, manifest.version, tuple(told))
    return (b"".join([header, *blobs]), len(header)) if blobs else (header, None)


# An output's name, dtype, shape, bytes where it is not in the JSON, and where it was put in shared memory.
_Told = tuple[str, np.dtype[Any], tuple[int, ...], int | None, Span | None]


@lru_cache(maxsize=64)
def _known_header(model: str, version: str, outputs: tuple[_Told, ...]) -> bytes:
    """The JSON part of an answer that has no numbers in it: the same for most answers of a model."""
    return msgspec.json.encode(_header(model, version, outputs))


def _header(model: str, version: str, outputs: Iterable[_Told]) -> dict[str, Any]:
    tensors: list[dict[str, Any]] = []
    for name, dtype, shape, size, span in outputs:
        tensor: dict[str, Any] = {"name": name, "datatype": datatype(name_of(dtype)), "shape": list(shape)}
        if span is not None:
            tensor["parameters"] = {"shared_memory_region": span.region, "shared_memory_byte_size": size}
            if span.offset:
                tensor["parameters"]["shared_memory_offset"] = span.offset
        elif size is not None:
            tensor["parameters"] = {"binary_data_size": size}
        tensors.append(tensor)
    return {"model_name": model, "model_version": version, "outputs": tensors}


def _put(name: str, span: Span, content: bytes, memory: Memory) -> None:
    if len(content) > span.size:
        raise BadRequestError(
            f"output {name!r} has {len(content)} bytes: shared_memory_byte_size leaves room for {span.size}",
            "outputs",
            name,
            *_PLACE,
        )
    memory.write(span.region, span.offset, content)


def _classes(wanted: Wanted, array: Array, manifest: Described) -> Array:
    if array.dtype.kind not in "fiu" or not array.size:
        raise BadRequestError(
            f"output {wanted.name!r}: classification needs numbers, and it has none", "outputs", wanted.name, *_CLASSES
        )
    return top_classes(array, wanted.classes, manifest.labels)
