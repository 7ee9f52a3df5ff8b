"""Reads source forms that strangers made, with bounds, before any runtime sees them.

ONNX's own checker passes a file that takes 16 GiB to run, and ONNX Runtime follows links in external data. So what can
be seen from the parsed file is bounded here; what can't is bounded by the memory and time of the process this runs in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from converters.errors import ConversionError

WEIGHTS_LIMIT = 4 << 30
NODES_LIMIT = 100_000
VALUES_LIMIT = 1024
DEPTH_LIMIT = 8
ELEMENTS_LIMIT = 1 << 30
NAME_LIMIT = 512
OLDEST_OPSET = 11
DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training", "com.microsoft"})
RUNS_CODE = "this is a PyTorch or pickle file, which can run code: push net.py:build with safetensors weights"


def parse_onnx(path: Path) -> Any:
    """An ONNX file as `onnx.ModelProto`, with everything bounded that can be seen without running it.

    Raises:
        ConversionError: `bad_model`, saying what is wrong and what would help.
    """
    import onnx
    from google.protobuf.message import DecodeError

    with path.open("rb") as file:
        start = file.read(8)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        raise _bad(RUNS_CODE)
    try:
        model = onnx.load_model(str(path), load_external_data=False)
    except (DecodeError, ValueError, RuntimeError) as error:
        raise _bad(f"not a readable ONNX file ({str(error)[:120]}): it may be cut short; export it again") from None
    if not model.graph.node or not model.graph.output:
        raise _bad("not an ONNX model: it has no graph; export it again")
    _check_graph(model.graph, depth=0)
    for function in model.functions:
        for node in function.node:
            _check_node(node, depth=1)
    _check_opsets(model)
    values = [*model.graph.input, *model.graph.output]
    constants = {tensor.name for tensor in model.graph.initializer}
    asked = [value for value in values if value.name not in constants]
    if len(asked) > VALUES_LIMIT:
        raise _bad(f"it has {len(asked)} inputs and outputs, at most {VALUES_LIMIT} are served")
    if all(value.name in constants for value in model.graph.input):
        raise _bad("it takes no input, so there is nothing to ask it: export it with its inputs free")
    for value in values:
        _check_shape(value)
    return model


def check_tflite(path: Path) -> None:
    """Refuse what can't be a TFLite file.

    Raises:
        ConversionError: `bad_model`.
    """
    with path.open("rb") as file:
        start = file.read(8)
    if start[4:8] != b"TFL3":
        raise _bad("not a TFLite file (its mark TFL3 is missing): export it again")


def _check_opsets(model: Any) -> None:
    """Refuse operators that devices do not have. A domain that is declared but not used hurts nobody."""
    own = {(function.domain, function.name) for function in model.functions}
    bodies = (model.graph.node, *(function.node for function in model.functions))
    used = {(node.domain, node.op_type) for nodes in bodies for node in nodes_of(nodes)} - own
    strange = sorted({domain for domain, _ in used if domain not in DOMAINS})
    if strange:
        domain = strange[0]
        names = ", ".join(sorted(name for one, name in used if one == domain)[:5])
        known = ", ".join(sorted(domain for domain in DOMAINS if domain))
        raise _bad(
            f"it needs operators of {domain[:80]!r} ({names[:200]}), which devices do not have; known are {known}: "
            "export it with standard operators"
        )
    for opset in model.opset_import:
        if opset.domain in {"", "ai.onnx"} and opset.version < OLDEST_OPSET:
            raise _bad(
                f"it is of opset {opset.version}: export it with opset {OLDEST_OPSET} or newer, or raise it with "
                "onnx.version_converter.convert_version"
            )


def nodes_of(nodes: Iterable[Any]) -> Iterator[Any]:
    """Nodes, and those of the graphs within them."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from nodes_of(graph.node)


def _check_graph(graph: Any, *, depth: int) -> None:
    if depth > DEPTH_LIMIT:
        raise _bad(f"its subgraphs are nested deeper than {DEPTH_LIMIT}")
    if len(graph.node) > NODES_LIMIT:
        raise _bad(f"it has {len(graph.node)} nodes, at most {NODES_LIMIT} are read")
    total = 0
    for tensor in _tensors(graph):
        total += _check_tensor(tensor)
        if total > WEIGHTS_LIMIT:
            raise _bad(f"its weights have more than {WEIGHTS_LIMIT} bytes")
    for node in graph.node:
        _check_node(node, depth=depth)


def _check_node(node: Any, *, depth: int) -> None:
    if any(len(name) > NAME_LIMIT for name in (node.name, node.op_type, *node.input, *node.output)):
        raise _bad(f"a name in it is longer than {NAME_LIMIT} characters")
    for attribute in node.attribute:
        if attribute.HasField("t"):
            _check_tensor(attribute.t)
        for tensor in attribute.tensors:
            _check_tensor(tensor)
        if attribute.HasField("g"):
            _check_graph(attribute.g, depth=depth + 1)
        for graph in attribute.graphs:
            _check_graph(graph, depth=depth + 1)


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices


def _check_tensor(tensor: Any) -> int:
    """Bytes of a tensor, at least."""
    import onnx

    if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
        raise _bad("its weights lie in another file: save it as one (onnx.save without external data)")
    if any(size < 0 for size in tensor.dims) or math.prod(tensor.dims) * 4 > WEIGHTS_LIMIT:
        raise _bad(f"the weight {tensor.name[:80]!r} has an impossible shape: {list(tensor.dims)[:8]}")
    return math.prod(tensor.dims)


def _check_shape(value: Any) -> None:
    if len(value.name) > NAME_LIMIT:
        raise _bad(f"a name in it is longer than {NAME_LIMIT} characters")
    sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim if dim.HasField("dim_value")]
    # A negative size says that it is free, as of some exporters.
    if math.prod(max(size, 1) for size in sizes) > ELEMENTS_LIMIT:
        raise _bad(f"{value.name[:80]!r} has the shape {sizes[:8]}: at most {ELEMENTS_LIMIT} elements are served")


def _bad(detail: str) -> ConversionError:
    return ConversionError("bad_model", f"sources: {detail}", "sources")
