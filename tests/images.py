"""Nets that take images, and real photographs to post to them."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

COLORS = ("red", "green", "blue")
SIDE = 16


def photo() -> Path:
    """A photograph of 512 × 600 pixels, a JPEG that comes with matplotlib."""
    spec = importlib.util.find_spec("matplotlib")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "mpl-data" / "sample_data" / "grace_hopper.jpg"


def tinted(count: int, seed: int = 0) -> tuple[list[bytes], Any]:
    """JPEG files cut from the photograph, of many sizes, each with a weak tint; and the tint's class."""
    rng = np.random.default_rng(seed)
    whole = np.asarray(Image.open(photo()).convert("RGB")).astype(np.float32)
    labels = rng.integers(0, 3, count)
    files = []
    for label in labels:
        height, width = rng.integers(20, 300, 2)
        top, left = rng.integers(0, whole.shape[0] - height), rng.integers(0, whole.shape[1] - width)
        part = whole[top : top + height, left : left + width].copy()
        part += part.mean() - part.mean(axis=(0, 1))  # grey on the whole
        part[..., label] += rng.uniform(2, 30)
        file = io.BytesIO()
        Image.fromarray(np.clip(part, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=int(rng.integers(50, 96)))
        files.append(file.getvalue())
    return files, labels.astype(np.int64)


def packed(files: list[bytes]) -> dict[str, Any]:
    """Encoded images as arrays of a data set."""
    return {
        "image_bytes": np.frombuffer(b"".join(files), np.uint8),
        "image_sizes": np.array([len(one) for one in files], np.int64),
    }


def write_color_net(path: Path, *, bias: float = 0.05, nhwc: bool = False) -> None:
    """Scores of red, green and blue: means of the channels of (batch, 3, 16, 16), with a bias towards blue.

    A small convolution makes it worth quantizing. With `nhwc` the channels come last, as a converter may have it.
    """
    kernel = np.zeros((3, 3, 3, 3), np.float32)
    for channel in range(3):
        kernel[channel, channel] = 1 / 9
    values = {"kernel": kernel, "factor": np.eye(3, dtype=np.float32) * 4, "bias": np.array([0, 0, bias], np.float32)}
    nodes = [
        *([helper.make_node("Transpose", ["image"], ["planes"], perm=[0, 3, 1, 2])] if nhwc else []),
        helper.make_node("Conv", ["planes" if nhwc else "image", "kernel"], ["smooth"], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["smooth"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("Gemm", ["flat", "factor", "bias"], ["scores"]),
    ]
    sizes = (SIDE, SIDE, 3) if nhwc else (3, SIDE, SIDE)
    _save(path, nodes, values, [("scores", ["batch", 3])], ["batch", *sizes])


def write_box_net(path: Path, boxes: Any, scores: Any) -> None:
    """A detector that always finds the same, as one output (1, 4 + classes, boxes) in the manner of YOLO."""
    table = np.concatenate([np.asarray(boxes, np.float32), np.asarray(scores, np.float32)], axis=1).T[None]
    values = {"table": table, "none": np.zeros((), np.float32)}
    nodes = [
        helper.make_node("ReduceMean", ["image"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "none"], ["zero"]),
        helper.make_node("Add", ["table", "zero"], ["output0"]),
    ]
    _save(path, nodes, values, [("output0", list(table.shape))], [1, 3, SIDE, SIDE])


def _save(path: Path, nodes: Any, values: Any, outputs: Any, shape: Any) -> None:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes) for name, sizes in outputs],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, str(path))
