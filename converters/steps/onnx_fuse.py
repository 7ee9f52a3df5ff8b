"""ONNX graphs in the shape that the target's execution provider runs fastest; the answers stay the same.

ONNX Runtime fuses operators as it loads a file, and that is not always for the better. Its CPU provider adds a residual
and normalizes it in one operator, SkipLayerNormalization, that is slower than the two it replaces: without it three
text encoders took 0.90, 0.92 and 1.00 of their time in fp32, and 0.76, 0.85 and 0.91 of it in dynamic int8 (ONNX
Runtime 1.32, x86-64, one thread, 128 or 512 words). `keep_sums` writes such residuals with `Sum`, of which ONNX Runtime
knows no such fusion and which adds two tensors as `Add` does.

Whole attention blocks it does not find by itself, its optimizer for transformers does. On the CPU that brought nothing
(1.00 in fp32, 0.39 against 0.39 in dynamic int8 with attention in integers), so `fuse_attention` is for CUDA.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from converters.errors import ConversionError
from converters.step import Context, Parameter

ATTENTION = frozenset({"Attention", "MultiHeadAttention"})


def keep_sums(
    source: Path, target: Path, _context: Context, _parameters: dict[str, Parameter], found: dict[str, Parameter]
) -> None:
    """Write the additions in front of layer normalizations so that neither is fused with the other.

    Raises:
        ConversionError: when there is no such addition.
    """
    import onnx

    model = onnx.load(str(source))
    changed = 0
    for node in _residuals(model.graph):
        node.op_type = "Sum"
        changed += 1
    if changed == 0:
        raise ConversionError("nothing_to_do", "no addition feeds a layer normalization: the recipe has nothing to do")
    found["residuals"] = changed
    onnx.save(model, str(target))


def _residuals(graph: Any) -> Iterator[Any]:
    """Additions of two computed tensors that a layer normalization reads, also one that is spelled out.

    A bias is none of them: the product before it takes it in.
    """
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {name for node in graph.node if node.op_type == "Constant" for name in node.output}
    readers: dict[str, set[str]] = defaultdict(set)
    for node in graph.node:
        for name in node.input:
            readers[name].add(node.op_type)
    for node in graph.node:
        if node.op_type != "Add" or constants & set(node.input):
            continue
        by = readers[node.output[0]]
        if "LayerNormalization" in by or {"ReduceMean", "Sub"} <= by:
            yield node


def fuse_attention(
    source: Path, target: Path, _context: Context, parameters: dict[str, Parameter], found: dict[str, Parameter]
) -> None:
    """Fuse attention, and the layer normalizations, residuals, embeddings and GELUs around it.

    With `half` the result is in half precision, but for what it takes and gives.

    Raises:
        ConversionError: when there is no attention that ONNX Runtime's optimizer knows. The rest ONNX Runtime fuses by
            itself when it loads a file.
    """
    import onnx
    from onnxruntime.transformers.optimizer import optimize_by_fusion

    with _few_words():
        fused = optimize_by_fusion(onnx.load(str(source)), "bert")  # the kind with the most patterns
        if parameters["half"]:
            fused.convert_float_to_float16(keep_io_types=True)
    counts: dict[str, int] = defaultdict(int)
    for node in fused.model.graph.node:
        if node.domain == "com.microsoft":
            counts[node.op_type] += 1
    if not ATTENTION & set(counts):
        detail = "no attention in the net that ONNX Runtime's optimizer knows: the rest is fused as the file is loaded"
        raise ConversionError("nothing_to_do", detail)
    found.update(sorted(counts.items()))
    fused.save_model_to_file(str(target))


@contextmanager
def _few_words() -> Iterator[None]:
    """Keep the optimizer from logging what it looked for and did not find, and who it thinks made the file."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
