"""What tests of ONNX to LiteRT share: the environment, if there, and a stand-in that answers what a test wants."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from converters.steps.export import export_tflite, quiet
from converters.steps.onnx_to_litert import Fixed, restore_names

ONNX2TF = Path(__file__).parents[1] / ".venv-onnx2tf" / "bin" / "python"
needs_onnx2tf = pytest.mark.skipif(not ONNX2TF.exists(), reason="no onnx2tf environment: make setup-onnx2tf")


def stand_in(folder: Path, answer: Path | None) -> Path:
    """A converter that answers with a file made before, or fails: the checks of its work are what is tested."""
    script = folder / "python"
    action = f'cp "{answer}" "$2/model.tflite"; echo \'{{"stand-in": "1"}}\' > "$2/tools.json"' if answer else "exit 4"
    script.write_text(f"#!/bin/sh\necho no such operator >&2\n{action}\n")
    script.chmod(0o755)
    return script


def converted(net: nn.Module, example: torch.Tensor, path: Path) -> Path:
    """A TFLite file of a net of one input, with the names that onnx2tf would have given its tensors."""
    with quiet():
        export_tflite(net.eval(), [example.numpy()], path)
    renamed = path.with_name(f"{path.stem}-named.tflite")
    restore_names(path, renamed, Fixed({"args_0": "net_in_0"}, {"output_0": "net_out_0"}, {}))
    return renamed
