"""A signature for TFLite files that have none (those of converters before 2021): quantizers calibrate by its names."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from converters.step import Context, Parameter

KEY = "serving_default"


def add_signature(
    source: Path, target: Path, _context: Context, _parameters: dict[str, Parameter], found: dict[str, Parameter]
) -> None:
    """Name the main graph's inputs and outputs after their tensors; a file that has a signature stays as it is."""
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(str(source))
    if model.signatureDefs:
        shutil.copyfile(source, target)
        return
    graph = model.subgraphs[0]

    def named(indices: Any) -> list[Any]:
        maps = []
        for index in indices:
            entry = schema.TensorMapT()
            entry.name, entry.tensorIndex = graph.tensors[index].name, int(index)
            maps.append(entry)
        return maps

    signature = schema.SignatureDefT()
    signature.signatureKey, signature.subgraphIndex = KEY, 0
    signature.inputs, signature.outputs = named(graph.inputs), named(graph.outputs)
    model.signatureDefs = [signature]
    flatbuffer_utils.write_model(model, str(target))
    found["added"] = True
