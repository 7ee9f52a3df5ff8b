"""A runtime that a package brings, whose inference is a sleep: as slow on a busy machine as on none.

A model's file is its milliseconds for a batch, in figures. It answers with its inputs, doubled. Where the first number
is below zero, it waits for as long as there is a file beside it whose name ends in `.held`.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from agent.protocol.manifest import Manifest, ModelFormat, Precision, TensorSpec

NAME = "asleep"
MODULE = """
import time


class Asleep:
    providers = ("cpu",)
    version = "asleep 1"
    provider = "cpu"
    fell_back = ""

    def __init__(self, manifest, path, compiled):
        self._seconds = float(path.read_text()) / 1000
        self._held = path.with_suffix(".held")

    def run(self, inputs):
        time.sleep(self._seconds)
        while inputs["x"].flat[0] < 0 and self._held.exists():
            time.sleep(0.01)
        return {"y": inputs["x"] * 2}

    def close(self):
        pass
"""


def install(folder: Path) -> dict[str, str]:
    """Put it into a folder; the environment in which a process finds it there."""
    info = folder / "asleep-1.dist-info"
    info.mkdir(parents=True)
    (folder / "asleep_runtime.py").write_text(MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: asleep\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[shoal.runtimes]\n{NAME} = asleep_runtime:Asleep\n")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}


def write_model(path: Path, milliseconds: float, **fields: Any) -> Manifest:
    """A model that takes rows of any width; its manifest, of version 1 of `slow` unless the fields say otherwise."""
    path.write_text(str(milliseconds))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    values: dict[str, Any] = {"model": "slow", "version": "1", "max_batch": 1, "digest": digest, **fields}
    return Manifest(
        size=path.stat().st_size, chunk_size=1024, variant_id="v", profile="p", format=ModelFormat.ONNX, runtime=NAME,
        precision=Precision.FP32, inputs=(TensorSpec("x", "float32", (-1, -1)),),
        outputs=(TensorSpec("y", "float32", (-1, -1)),), **values,
    )  # fmt: skip
