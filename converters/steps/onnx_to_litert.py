"""A LiteRT file from an ONNX one, by onnx2tf in an environment of its own.

onnx2tf needs TensorFlow and older libraries than Shoal's, so it runs as a process of another Python. What it makes is
believed only after it has been compared with the ONNX file on real rows (`converters.starts`).

onnx2tf stumbles over names such as `images:0`, so it is given a net with plain ones. The result's signature gets the
source's names back: by them tensors pair, never by their order.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agent.trial.dataset import Dataset
from converters.errors import ConversionError
from converters.job import PassRecord
from converters.steps.onnx2tf_worker import NOT_INSTALLED

WORKER = Path(__file__).with_name("onnx2tf_worker.py")
MAX_RANK = 5
TAIL_BYTES = 64 * 1024
REMEDY = "push the version with a TFLite form of its own, or give the profile the runtime onnx"
# onnx2tf looks for this file in its working folder before it asks the internet for it, where a net may take images.
SAMPLE_IMAGES = "calibration_image_sample_data_20x128x128x3_float32.npy"
OPTIONS: dict[str, bool | str] = {
    "output_signaturedefs": True,
    "copy_onnx_input_output_names_to_tflite": True,
    "not_use_onnxsim": True,  # ONNX Runtime has folded the net, and onnxsim would be looked up in PATH
    "non_verbose": True,
    "verbosity": "error",
}
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Derived:
    """A converted file, the passes that made it, and the versions of the tools."""

    path: Path
    passes: tuple[PassRecord, ...]
    tools: dict[str, str]


@dataclass(frozen=True)
class Fixed:
    """What became of a net's tensors: plain names to the source's, and the shapes of inputs by the source's names."""

    inputs: dict[str, str]
    outputs: dict[str, str]
    shapes: dict[str, list[int]]


def convert(source: Path, folder: Path, python: Path, data: Dataset) -> Derived:
    """Convert an ONNX file to a TFLite fp32 file that takes one row.

    Args:
        source: the ONNX file.
        folder: an existing folder for the results.
        python: the interpreter of an environment with onnx2tf.
        data: real rows. They tell the sizes of free dimensions other than the first, and onnx2tf tries its work on one.

    Raises:
        ConversionError: `not_convertible`, with the tool's own reason; `no_onnx2tf` when the interpreter has none.
    """
    started = time.monotonic()
    work = folder / "onnx2tf"
    work.mkdir()
    plain = work / "fixed.onnx"
    fixed = fix_shapes(source, plain, data)
    frozen = PassRecord(
        "onnx-fix-shapes",
        {"shapes": json.dumps(fixed.shapes)},
        round(time.monotonic() - started, 3),
        source.stat().st_size,
        plain.stat().st_size,
    )
    started = time.monotonic()
    before = plain.stat().st_size
    options = {**OPTIONS, "keep_shape_absolutely_input_names": list(fixed.inputs)}
    _run(python, work, {"onnx": str(plain), "rows": _rows(work, fixed, data), "options": options})
    target = folder / "derived.tflite"
    restore_names(work / "model.tflite", target, fixed)
    tools: dict[str, str] = json.loads((work / "tools.json").read_text())
    record = PassRecord(
        "onnx2tf",
        {**OPTIONS, "keep_shape_absolutely_input_names": ",".join(fixed.inputs.values())},
        round(time.monotonic() - started, 3),
        before,
        target.stat().st_size,
    )
    shutil.rmtree(work)
    return Derived(target, (frozen, record), tools)


def _rows(work: Path, fixed: Fixed, data: Dataset) -> dict[str, str]:
    """Files with one real row of each input, by plain name; and images for the case that onnx2tf wants some."""
    np.save(work / SAMPLE_IMAGES, np.random.default_rng(0).random((20, 128, 128, 3), dtype=np.float32))
    paths = {}
    for plain, name in fixed.inputs.items():
        path = work / f"{plain}.npy"
        np.save(path, data.inputs[name][:1])
        paths[plain] = str(path)
    return paths


def _run(python: Path, work: Path, request: dict[str, Any]) -> None:
    """Run the worker in this process's group and bounds: it ends with it, and has its limits of memory and time."""
    (work / "request.json").write_text(json.dumps(request))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [str(python), str(WORKER), str(work), str(os.getpid())]
    try:
        with (work / "output").open("wb") as output:
            status = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
                env=environment,
                cwd=work,
            ).returncode
    except OSError as error:
        raise _not_installed(python, str(error)) from None
    if status == 0:
        return
    told = work / "error.txt"
    reason = tool_reason(told.read_text(errors="replace")) if told.exists() else ""
    if status == NOT_INSTALLED and reason:
        raise _not_installed(python, reason)
    if not reason:
        reason = last_words(_tail(work / "output"))
    if status < 0:
        name = signal.Signals(-status).name
        reason = f"ended by {name}, perhaps for lack of memory (SHOAL_CONVERSION_MEMORY_MB): {reason}"
    detail = f"onnx2tf can't convert this net to LiteRT ({reason}): {REMEDY}"
    raise ConversionError("not_convertible", detail, "sources")


def _not_installed(python: Path, reason: str) -> ConversionError:
    detail = (
        f"{python} does not run onnx2tf ({reason}): make setup-onnx2tf, and name its Python in SHOAL_ONNX2TF_PYTHON"
    )
    return ConversionError("no_onnx2tf", detail, "sources")


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return file.read()


def tool_reason(text: str) -> str:
    """The first lines of an exception's text, in one: what follows are the arguments of the call."""
    lines = [
        _COLOUR.sub("", line).strip() for line in text.split("Call arguments received", maxsplit=1)[0].splitlines()
    ]
    return " ".join(line for line in lines if line)[:300]


def last_words(output: bytes) -> str:
    """The last line with a word in it, without colours."""
    lines = [_COLOUR.sub("", line).strip() for line in output.decode(errors="replace").splitlines()]
    words = [line for line in lines if line]
    return words[-1][:300] if words else "it ended without a word"


def fix_shapes(source: Path, target: Path, data: Dataset) -> Fixed:
    """Write an ONNX file for one row, with plain names and every shape fixed, and what follows from that folded.

    Raises:
        ConversionError: when ONNX Runtime can't load the file with those shapes.
    """
    import onnx
    import onnxruntime

    model = onnx.load(str(source), load_external_data=False)
    shapes = _fix_inputs(model, data)
    fixed = _rename(model, list(shapes), shapes)
    del model.graph.value_info[:]
    given = target.with_suffix(".given.onnx")
    options = onnxruntime.SessionOptions()
    # Basic: constant folding and the like; higher levels write operators that only ONNX Runtime has.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 4
    try:
        onnx.save(model, str(given))
        onnxruntime.InferenceSession(str(given), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 (ONNX Runtime's errors have no common base)
        detail = f"sources: with the shapes {shapes} the net does not load ({str(error)[:300]}): {REMEDY}"
        raise ConversionError("not_convertible", detail, "sources") from None
    given.unlink()
    return fixed


def _fix_inputs(model: Any, data: Dataset) -> dict[str, list[int]]:
    """Give every free dimension a size, outputs' too where they share a name with an input's; returns the shapes."""
    constants = {tensor.name for tensor in model.graph.initializer}
    sizes: dict[str, int] = {}
    shapes = {}
    for value in model.graph.input:
        if value.name in constants:
            continue
        dims = value.type.tensor_type.shape.dim
        row = data.row_shape(value.name)
        for axis, dim in enumerate(dims):
            if not dim.HasField("dim_value") or dim.dim_value < 0:
                size = int(row[axis])
                if dim.dim_param:
                    sizes[dim.dim_param] = size
                dim.dim_value = size
        shapes[value.name] = [dim.dim_value for dim in dims]
    for value in model.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    return shapes


def _rename(model: Any, inputs: list[str], shapes: dict[str, list[int]]) -> Fixed:
    """Put plain names on inputs and outputs, through identities, which ONNX Runtime then takes away."""
    import onnx

    graph = model.graph
    taken = {name for node in graph.node for name in (*node.input, *node.output)} | {t.name for t in graph.initializer}
    stem = "net"
    while any(name.startswith(stem) for name in taken):
        stem += "_"
    fixed = Fixed({}, {}, shapes)
    before, after = [], []
    for value in graph.input:
        if value.name in inputs:
            plain = f"{stem}_in_{len(fixed.inputs)}"
            fixed.inputs[plain] = value.name
            before.append(onnx.helper.make_node("Identity", [plain], [value.name]))
            value.name = plain
    for value in graph.output:
        plain = f"{stem}_out_{len(fixed.outputs)}"
        fixed.outputs[plain] = value.name
        after.append(onnx.helper.make_node("Identity", [value.name], [plain]))
        value.name = plain
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    return fixed


def restore_names(made: Path, target: Path, fixed: Fixed) -> None:
    """Write a TFLite file whose signature has the source's names.

    Raises:
        ConversionError: when its signature has other names than the net that it was made of.
    """
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(str(made))
    signatures = model.signatureDefs or []
    for names, tensors in (
        (fixed.inputs, signatures[0].inputs if signatures else []),
        (fixed.outputs, signatures[0].outputs if signatures else []),
    ):
        found = [_text(tensor.name) for tensor in tensors]
        if sorted(found) != sorted(names):
            detail = f"what onnx2tf made has tensors {sorted(found)} where {sorted(names)} were asked for: {REMEDY}"
            raise ConversionError("not_convertible", detail, "sources")
        for tensor, name in zip(tensors, found, strict=True):
            tensor.name = names[name]
    flatbuffer_utils.write_model(model, str(target))


def _text(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else name


def find_permutation(source: npt.NDArray[Any], file: npt.NDArray[Any]) -> tuple[int, ...] | None:
    """How a source's answer is transposed to get the file's: the nearest fit over all orders that keep rows first.

    Args:
        source: (rows, …), any float or integer dtype.
        file: the same answer, perhaps with its axes in another order.

    Returns:
        Axes as numpy's `transpose` takes them; None when the order is the same.

    Raises:
        ConversionError: when no order gives the file's shape.
    """
    if source.ndim != file.ndim or source.ndim > MAX_RANK:
        if source.shape == file.shape:
            return None
        raise _no_order(source, file)
    same = tuple(range(source.ndim))
    orders = [(0, *rest) for rest in permutations(same[1:])] if same else [()]
    fitting = [order for order in orders if tuple(source.shape[axis] for axis in order) == file.shape]
    if not fitting:
        raise _no_order(source, file)
    wanted = file.astype(np.float64)
    best = min(fitting, key=lambda order: _distance(source.transpose(order).astype(np.float64), wanted))
    return None if best == same else best


def _distance(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    return float(np.abs(one - other).mean()) if one.size else 0.0


def _no_order(source: npt.NDArray[Any], file: npt.NDArray[Any]) -> ConversionError:
    detail = f"gives an answer of shape {list(file.shape)} where the source's is {list(source.shape)}"
    return ConversionError("not_convertible", detail, "sources")
