"""What TFLite files of converters before 2021 lack and quantizers look for: a signature, and codes of operators.

Quantizers calibrate by a signature's names. And an operator's code has moved to a wider field (the schema's version 3a,
which says to take the larger of the two); AI Edge Quantizer reads the new one alone, takes every operator for code 0,
and would leave the file as it is without a word.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from converters.step import Context, Parameter

KEY = "serving_default"


def add_signature(
    source: Path, target: Path, _context: Context, _parameters: dict[str, Parameter], found: dict[str, Parameter]
) -> None:
    """Name the main graph's inputs and outputs after their tensors, and write codes where they are read.

    A file that has both stays as it is.
    """
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(str(source))
    codes = _write_codes(model)
    if model.signatureDefs and not codes:
        shutil.copyfile(source, target)
        return
    if codes:
        found["codes"] = codes
    if not model.signatureDefs:
        model.signatureDefs = [_signature(model)]
        found["added"] = True
    flatbuffer_utils.write_model(model, str(target))


def _write_codes(model: Any) -> int:
    from ai_edge_litert.tools import flatbuffer_utils

    changed = 0
    for one in model.operatorCodes:
        code = flatbuffer_utils.get_builtin_code_from_operator_code(one)
        changed += code != one.builtinCode
        one.builtinCode = code
    return changed


def _signature(model: Any) -> Any:
    from ai_edge_litert import schema_py_generated as schema

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
    return signature
