"""Open Inference Protocol v2 bodies: JSON tensors and the binary tensor extension, to and from arrays. No HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from agent.protocol.manifest import Manifest, TensorSpec
from agent.runtimes.base import Array, Tensors

DATATYPES = {
    "BOOL": "bool", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64", "INT8": "int8",
    "INT16": "int16", "INT32": "int32", "INT64": "int64", "FP16": "float16", "FP32": "float32", "FP64": "float64",
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DATATYPES.items()}


class BadRequestError(Exception):
    """The request does not fit the model; the message names the input and what is expected."""


@dataclass(frozen=True)
class InferRequest:
    """A decoded request: arrays by input name, and which outputs are wanted, in binary or as JSON."""

    request_id: str
    inputs: Tensors
    outputs: list[tuple[str, bool]]


def datatype(dtype: str) -> str:
    """The protocol's name of a numpy dtype."""
    return _NAMES.get(dtype, dtype.upper())


def decode_request(body: bytes, header_length: int | None, manifest: Manifest) -> InferRequest:
    """Read an infer request.

    Args:
        body: of the HTTP request.
        header_length: of the JSON part, where binary tensors follow it.
        manifest: of the model that will answer.

    Raises:
        BadRequestError: saying what does not fit.
    """
    length = len(body) if header_length is None else header_length
    if not 0 <= length <= len(body):
        raise BadRequestError("Inference-Header-Content-Length is larger than the body")
    try:
        header = msgspec.json.decode(body[:length])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequestError(f"the body is not JSON: {error}") from None
    if not isinstance(header, dict) or not isinstance(header.get("inputs"), list):
        raise BadRequestError("the body has no list `inputs`")
    specs = {spec.name: spec for spec in manifest.inputs}
    inputs: Tensors = {}
    position = length
    for tensor in header["inputs"]:
        name = tensor.get("name") if isinstance(tensor, dict) else None
        if not isinstance(name, str) or name not in specs:
            raise BadRequestError(f"inputs: the model has no input {name!r}, but {', '.join(specs)}")
        size = _binary_size(tensor)
        raw = None
        if size is not None:
            raw = body[position : position + size]
            position += size
        inputs[name] = _tensor(specs[name], tensor, raw, any_rows=manifest.row_by_row)
    missing = sorted(set(specs) - set(inputs))
    if missing:
        raise BadRequestError(f"inputs: {', '.join(missing)} is missing")
    if manifest.row_by_row and len({array.shape[0] for array in inputs.values()}) > 1:
        rows = {name: array.shape[0] for name, array in inputs.items()}
        raise BadRequestError(f"inputs: they have different numbers of rows: {rows}")
    if position != len(body):
        raise BadRequestError(f"the body has {len(body) - position} bytes that no input claims")
    return InferRequest(str(header.get("id") or ""), inputs, _wanted(header, manifest))


def _binary_size(tensor: dict[str, Any]) -> int | None:
    parameters = tensor.get("parameters")
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is None:
        return None
    if not isinstance(size, int) or size < 0:
        raise BadRequestError(f"inputs: binary_data_size of {tensor.get('name')!r} is not a size")
    return size


def _tensor(spec: TensorSpec, tensor: dict[str, Any], raw: bytes | None, *, any_rows: bool) -> Array:
    if tensor.get("datatype") != datatype(spec.dtype):
        raise BadRequestError(
            f"input {spec.name!r} has datatype {tensor.get('datatype')!r}, the model takes {datatype(spec.dtype)}"
        )
    shape = tensor.get("shape")
    if not isinstance(shape, list) or not all(isinstance(size, int) and 0 < size < 1 << 31 for size in shape):
        raise BadRequestError(f"input {spec.name!r} has no usable shape: {str(shape)[:100]}")
    taken = _shape(spec, any_rows=any_rows)
    if len(shape) != len(taken) or not all(w in {-1, g} for w, g in zip(taken, shape, strict=True)):
        raise BadRequestError(f"input {spec.name!r} has shape {shape}, the model takes {taken} (-1: any)")
    try:
        if raw is not None:
            array = np.frombuffer(raw, dtype=np.dtype(spec.dtype).newbyteorder("<"))
        else:
            with np.errstate(over="raise"):
                array = np.array(tensor.get("data"), dtype=np.dtype(spec.dtype)).reshape(-1)
        return array.reshape(shape)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise BadRequestError(f"input {spec.name!r}: its data does not fill shape {shape}: {error}") from None


def _shape(spec: TensorSpec, *, any_rows: bool) -> list[int]:
    """A tensor's shape as clients see it."""
    return [-1, *spec.shape[1:]] if any_rows else list(spec.shape)


def _wanted(header: dict[str, Any], manifest: Manifest) -> list[tuple[str, bool]]:
    names = [spec.name for spec in manifest.outputs]
    parameters = header.get("parameters")
    binary = bool(parameters.get("binary_data_output")) if isinstance(parameters, dict) else False
    asked = header.get("outputs")
    if not asked:
        return [(name, binary) for name in names]
    wanted = []
    for output in asked if isinstance(asked, list) else []:
        name = output.get("name") if isinstance(output, dict) else None
        if name not in names:
            raise BadRequestError(f"outputs: the model has no output {name!r}, but {', '.join(names)}")
        own = output.get("parameters")
        wanted.append((name, bool(own.get("binary_data", binary)) if isinstance(own, dict) else binary))
    return wanted


def encode_response(request: InferRequest, outputs: Tensors, manifest: Manifest) -> tuple[bytes, int | None]:
    """The body of an answer, and the length of its JSON part when binary tensors follow it."""
    tensors, blobs = [], []
    for name, binary in request.outputs:
        array = np.ascontiguousarray(outputs[name])
        tensor: dict[str, Any] = {"name": name, "datatype": datatype(array.dtype.name), "shape": list(array.shape)}
        if binary:
            blob = array.tobytes()
            tensor["parameters"] = {"binary_data_size": len(blob)}
            blobs.append(blob)
        else:
            tensor["data"] = array.reshape(-1).tolist()
        tensors.append(tensor)
    answer = {"model_name": manifest.model, "model_version": manifest.version, "outputs": tensors}
    if request.request_id:
        answer["id"] = request.request_id
    header = msgspec.json.encode(answer)
    return (header + b"".join(blobs), len(header)) if blobs else (header, None)


def metadata(manifest: Manifest) -> dict[str, Any]:
    """A model's description."""

    def tensor(spec: TensorSpec) -> dict[str, Any]:
        return {
            "name": spec.name,
            "datatype": datatype(spec.dtype),
            "shape": _shape(spec, any_rows=manifest.row_by_row),
        }

    return {
        "name": manifest.model,
        "versions": [manifest.version],
        "platform": f"{manifest.runtime}_{manifest.precision.value}",
        "inputs": [tensor(spec) for spec in manifest.inputs],
        "outputs": [tensor(spec) for spec in manifest.outputs],
    }
