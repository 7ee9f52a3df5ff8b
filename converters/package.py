"""What a file takes and gives: tensor specs of ONNX and TFLite files, and manifests to open them with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from agent.protocol.limits import LIMITS
from agent.protocol.manifest import Manifest, ModelFormat, Precision, RuntimeName, TensorSpec
from agent.runtimes.base import STRING
from agent.trial.dataset import Dataset
from converters.errors import ConversionError
from converters.job import Target

ONNX_DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float16",
    11: "float64", 12: "uint32", 13: "uint64", 8: STRING,
}  # fmt: skip

RUNTIMES = {
    ModelFormat.ONNX: RuntimeName.ONNX,
    ModelFormat.TFLITE: RuntimeName.LITERT,
    ModelFormat.PT2: RuntimeName.TORCH,
}
Specs = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]
_STRUCTURES = {
    "sequence_type": "is a sequence: stack it to one tensor (of skl2onnx by options={'zipmap': False})",
    "map_type": "is a map: give keys and values as tensors (of skl2onnx by options={'zipmap': False})",
    "optional_type": "may be absent: export the net with it, or without",
    "sparse_tensor_type": "is sparse: give it dense",
}


def onnx_specs(model: Any) -> Specs:
    """Inputs and outputs of a parsed ONNX model.

    Raises:
        ConversionError: naming a tensor that can't be served, and what would help.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    asked = [value for value in model.graph.input if value.name not in constants]
    for value in asked:
        if value.type.WhichOneof("value") == "tensor_type" and not value.type.tensor_type.HasField("shape"):
            raise _unserved(
                value, "does not say how many axes it has: declare its shape, with free sizes where it varies"
            )
    inputs = tuple(_onnx_spec(value) for value in asked)
    return inputs, tuple(_onnx_spec(value) for value in model.graph.output)


def _onnx_spec(value: Any) -> TensorSpec:
    import onnx

    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        raise _unserved(value, _STRUCTURES.get(kind or "", "has no type: export it again"))
    tensor = value.type.tensor_type
    if tensor.elem_type not in ONNX_DTYPES:
        known = onnx.TensorProto.DataType.DESCRIPTOR.values_by_number.get(tensor.elem_type)
        if known is None:
            raise _unserved(value, f"is of a dtype, {tensor.elem_type}, that ONNX does not have: export it again")
        dtype = known.name.lower()
        raise _unserved(value, f"is of {dtype}: put a Cast from or to a dtype that numpy has there")
    shape = tuple(max(size.dim_value, -1) if size.HasField("dim_value") else -1 for size in tensor.shape.dim)
    return TensorSpec(value.name, ONNX_DTYPES[tensor.elem_type], shape)


def _unserved(value: Any, said: str) -> ConversionError:
    detail = f"sources: only plain tensors of numbers and texts can be served, but {value.name[:80]!r} {said}"
    return ConversionError("bad_model", detail, "sources")


def tflite_specs(path: Path, names: Specs | None) -> Specs:
    """Inputs and outputs of a TFLite file, under the names, dtypes and axes of the source they pair with.

    Args:
        path: of the file.
        names: the source's specs; None where the file is the source. A `permutation` in them is of the file's axes.

    Raises:
        ConversionError: when it does not load, or has another number of tensors than the source.
    """
    from ai_edge_litert.interpreter import Interpreter

    try:
        interpreter = Interpreter(model_path=str(path), num_threads=1)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        detail = f"sources: LiteRT can't load the TFLite file: {str(error)[:300]}; export it again"
        raise ConversionError("bad_model", detail, "sources") from None
    signature = _signature(interpreter)
    found = []
    for side, details in enumerate((interpreter.get_input_details(), interpreter.get_output_details())):
        if names is None:
            found.append(tuple(_tflite_spec(detail, None) for detail in details))
            continue
        if len(names[side]) != len(details):
            detail = f"sources: the TFLite form has {len(details)} tensors where the other form has {len(names[side])}"
            raise ConversionError("forms_disagree", detail, "sources")
        found.append(_paired(details, names[side], signature[side]))
    return found[0], found[1]


def _signature(interpreter: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Tensor indices by the names of the file's first signature: of inputs, and of outputs."""
    signatures = interpreter.get_signature_list()
    if not signatures:
        return {}, {}
    runner = interpreter.get_signature_runner(next(iter(signatures)))
    sides = (runner.get_input_details(), runner.get_output_details())
    return tuple({name: detail["index"] for name, detail in side.items()} for side in sides)  # type: ignore[return-value]


def _paired(
    details: list[dict[str, Any]], sources: tuple[TensorSpec, ...], signature: dict[str, int]
) -> tuple[TensorSpec, ...]:
    """By the signature's names where they are the source's, else in order, as exporters of torch nets keep it."""
    if set(signature) == {source.name for source in sources}:
        by_index = {detail["index"]: detail for detail in details}
        return tuple(_tflite_spec(by_index[signature[source.name]], source) for source in sources)
    return tuple(_tflite_spec(detail, source) for detail, source in zip(details, sources, strict=True))


def _tflite_spec(detail: dict[str, Any], source: TensorSpec | None) -> TensorSpec:
    signature = [int(size) for size in detail.get("shape_signature", detail["shape"])]
    shape = tuple(signature if len(signature) == len(detail["shape"]) else map(int, detail["shape"]))
    if source is None:
        return TensorSpec(detail["name"], detail["dtype"].__name__, shape, file_name=detail["name"])
    if source.permutation:
        shape = tuple(shape[source.permutation.index(axis)] for axis in range(len(shape)))
    return msgspec.structs.replace(source, shape=shape, file_name=detail["name"])


def with_examples(specs: Specs, data: Dataset) -> Specs:
    """Specs whose inputs carry the shape of a row of the data, and the value of a scalar."""
    inputs = []
    for spec in specs[0]:
        if spec.name in data.inputs:
            value = float(data.inputs[spec.name][0]) if not spec.shape and spec.dtype != STRING else None
            spec = msgspec.structs.replace(spec, example_shape=data.row_shape(spec.name), example_value=value)  # noqa: PLW2901
        inputs.append(spec)
    return tuple(inputs), specs[1]


def as_seen(specs: Specs, shapes: dict[str, tuple[int, ...]]) -> Specs:
    """Specs whose outputs are as the net really answers: exporters write sizes that do not hold, or none at all.

    Args:
        specs: of a file.
        shapes: of answers that were seen, by name, with -1 where they differed from row to row.
    """
    outputs = []
    for spec in specs[1]:
        seen = shapes.get(spec.name, spec.shape)
        if len(seen) != len(spec.shape):
            shape = (-1,) * len(seen)
        else:
            shape = tuple(said if said == size else -1 for said, size in zip(spec.shape, seen, strict=True))
        outputs.append(msgspec.structs.replace(spec, shape=shape))
    return specs[0], tuple(outputs)


def manifest_for(
    path: Path, specs: Specs, file_format: ModelFormat, target: Target, *, precision: Precision = Precision.FP32
) -> Manifest:
    """A manifest to open a file with here, as a device would."""
    return Manifest(
        digest="0" * 64,
        size=path.stat().st_size,
        chunk_size=LIMITS.chunk_bytes,
        model="model",
        version="0",
        variant_id="",
        profile=target.profile,
        format=file_format,
        runtime=RUNTIMES[file_format],
        precision=precision,
        inputs=specs[0],
        outputs=specs[1],
        providers=target.providers,
        threads=target.threads,
        provider_options=target.provider_options,
        max_batch=max_batch(specs, target.max_batch),
    )


def max_batch(specs: Specs, wanted: int) -> int:
    """The largest batch of a file: 1 unless the first axis of every input and output is free."""
    free = all(spec.shape and spec.shape[0] == -1 for side in specs for spec in side)
    return wanted if free else 1
