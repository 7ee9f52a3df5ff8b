"""TFLite weights that are stored in half precision, as the fp32 constants that they are computed with.

Converters write such weights as float16 constants behind DEQUANTIZE operators, and the device widens them when it loads
the file. AI Edge Quantizer quantizes only what is a constant itself. Every float16 number is a float32 number too, so
the folded file answers as before.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from converters.step import Context, Parameter


def widen_constants(
    source: Path, target: Path, _context: Context, _parameters: dict[str, Parameter], found: dict[str, Parameter]
) -> None:
    """Put fp32 constants in the place of DEQUANTIZE operators that read float16 ones; without any, the file stays."""
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(str(source))
    wide: dict[int, int] = {}
    widened = 0
    for number, graph in enumerate(model.subgraphs):
        narrow = _widen(model, graph, wide)
        widened += len(narrow)
        signatures = [one for one in model.signatureDefs or [] if one.subgraphIndex == number]
        _drop_tensors(graph, signatures, set(narrow) - _used(graph))
    if widened == 0:
        shutil.copyfile(source, target)
        return
    _empty(model, set(wide))
    flatbuffer_utils.write_model(model, str(target))
    found["widened"] = widened


def _widen(model: Any, graph: Any, wide: dict[int, int]) -> list[int]:
    """Fold one graph; returns the float16 tensor of each operator taken out.

    `wide` pairs buffers of float16 with those made of them.
    """
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    kept, narrow = [], []
    made = {index for operator in graph.operators for index in operator.outputs}
    for operator in graph.operators:
        name = flatbuffer_utils.opcode_to_name(model, operator.opcodeIndex)
        if name != "DEQUANTIZE" or operator.inputs[0] in made or operator.outputs[0] in graph.outputs:
            kept.append(operator)
            continue
        half, full = graph.tensors[operator.inputs[0]], graph.tensors[operator.outputs[0]]
        data = model.buffers[half.buffer].data
        plain = half.type == schema.TensorType.FLOAT16 and full.type == schema.TensorType.FLOAT32
        if not plain or half.sparsity is not None or data is None or len(data) == 0:
            kept.append(operator)
            continue
        if half.buffer not in wide:
            buffer = schema.BufferT()
            values = np.frombuffer(bytes(data), "<f2").astype("<f4")
            buffer.data = np.frombuffer(values.tobytes(), np.uint8)
            wide[half.buffer] = len(model.buffers)
            model.buffers.append(buffer)
        full.buffer = wide[half.buffer]
        narrow.append(int(operator.inputs[0]))
    graph.operators = kept
    return narrow


def _used(graph: Any) -> set[int]:
    return {int(one) for operator in graph.operators for one in operator.inputs} | {*graph.inputs, *graph.outputs}


def _drop_tensors(graph: Any, signatures: list[Any], dropped: set[int]) -> None:
    """Take tensors out that nothing reads: without numbers, they are what the calibrator stumbles over."""
    if not dropped:
        return
    kept = [index for index in range(len(graph.tensors)) if index not in dropped]
    place = {index: number for number, index in enumerate(kept)}
    place[-1] = -1  # an input that is left out
    graph.tensors = [graph.tensors[index] for index in kept]
    for operator in graph.operators:
        for field in ("inputs", "outputs", "intermediates"):
            listed = getattr(operator, field)
            if listed is not None:
                setattr(operator, field, [place[int(index)] for index in listed])
    graph.inputs = [place[int(index)] for index in graph.inputs]
    graph.outputs = [place[int(index)] for index in graph.outputs]
    for signature in signatures:
        for tensor in (*signature.inputs, *signature.outputs):
            tensor.tensorIndex = place[int(tensor.tensorIndex)]


def _empty(model: Any, buffers: set[int]) -> None:
    """Drop the numbers of buffers that no operator reads any more; nothing else would, and they would be shipped."""
    read = {metadata.buffer for metadata in model.metadata or []}
    for graph in model.subgraphs:
        read |= {graph.tensors[index].buffer for index in _used(graph) if index >= 0}
    for index in buffers - read:
        model.buffers[index].data = None
