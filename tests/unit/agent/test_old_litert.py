"""Devices with tflite-runtime in the place of ai-edge-litert. It needs an older numpy, so its module is a stand-in."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest

from agent import hardware
from agent.protocol.errors import WireErrorCode
from agent.protocol.manifest import Manifest, ModelFormat, Precision, RuntimeName, TensorSpec
from agent.runtimes import open_runtime
from agent.runtimes.base import RuntimeLoadError


class Interpreter:
    """What tflite-runtime's does for a net that doubles its input."""

    def __init__(self, model_path: str, num_threads: int) -> None:
        self._value = np.zeros((1, 2), np.float32)

    def allocate_tensors(self) -> None: ...

    def get_input_details(self) -> list[dict[str, Any]]:
        return [
            {"name": "x", "index": 0, "shape": np.array([1, 2]), "dtype": np.float32, "quantization": (0.0, 0)},
        ]

    def get_output_details(self) -> list[dict[str, Any]]:
        return [{**self.get_input_details()[0], "name": "y", "index": 1}]

    def set_tensor(self, index: int, value: np.ndarray) -> None:
        self._value = value

    def invoke(self) -> None: ...

    def get_tensor(self, index: int) -> np.ndarray:
        return self._value * 2


@pytest.fixture
def old_library(monkeypatch: pytest.MonkeyPatch) -> None:
    package, module = ModuleType("tflite_runtime"), ModuleType("tflite_runtime.interpreter")
    package.interpreter = module  # type: ignore[attr-defined]
    module.Interpreter = Interpreter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    monkeypatch.setitem(sys.modules, "tflite_runtime", package)
    monkeypatch.setitem(sys.modules, "tflite_runtime.interpreter", module)
    known = importlib.metadata.version

    def version(name: str) -> str:
        if name == "ai-edge-litert":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.14.0" if name == "tflite-runtime" else known(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def manifest(precision: Precision) -> Manifest:
    values = (TensorSpec("x", "float32", (1, 2)),), (TensorSpec("y", "float32", (1, 2)),)
    return Manifest(
        "a" * 64, 1, 1, "m", "1", "v", "p", ModelFormat.TFLITE, RuntimeName.LITERT, precision, *values
    )  # fmt: skip


@pytest.mark.usefixtures("old_library")
@pytest.mark.parametrize("precision", Precision)
def test_fp32_and_static_int8_run_and_the_rest_is_refused(tmp_path: Path, precision: Precision) -> None:
    path = tmp_path / "m.tflite"
    path.write_bytes(b"net")
    if precision in {Precision.FP32, Precision.INT8}:
        runtime = open_runtime(manifest(precision), path)
        assert runtime.version == "tflite-runtime 2.14.0"
        answer = runtime.run({"x": np.array([[1, 2]], np.float32)})
        np.testing.assert_array_equal(answer["y"], [[2, 4]])
        return
    with pytest.raises(RuntimeLoadError, match="install ai-edge-litert") as raised:
        open_runtime(manifest(precision), path)
    assert raised.value.code is WireErrorCode.PRECISION_UNSUPPORTED
    assert precision.value in raised.value.detail


@pytest.mark.usefixtures("old_library")
def test_the_library_is_a_fact(tmp_path: Path) -> None:
    facts = hardware.measure(tmp_path, tags={}, runtimes=("litert",))
    assert [(one.package, one.version) for one in facts.runtimes] == [("tflite-runtime", "2.14.0")]


def test_of_both_the_one_that_is_used_is_the_fact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "9.9")
    facts = hardware.measure(tmp_path, tags={}, runtimes=("litert",))
    assert [one.package for one in facts.runtimes] == ["ai-edge-litert"]


@pytest.mark.usefixtures("old_library")
@pytest.mark.parametrize(("provider", "library"), [("gpu", "libtensorflowlite_gpu_delegate.so"), ("npu", "no such")])
def test_a_delegate_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provider: str, library: str
) -> None:
    def load_delegate(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(sys.modules["tflite_runtime.interpreter"], "load_delegate", load_delegate, raising=False)
    path = tmp_path / "m.tflite"
    path.write_bytes(b"net")
    wanted = msgspec.structs.replace(manifest(Precision.FP32), providers=(provider, "cpu"))
    runtime = open_runtime(wanted, path)
    assert runtime.provider == "xnnpack"
    assert runtime.fell_back.startswith(f"{provider}: ")
    assert library in runtime.fell_back
    with pytest.raises(RuntimeLoadError) as raised:
        open_runtime(wanted, path, may_fall_back=False)
    assert raised.value.code is WireErrorCode.PROVIDER_UNAVAILABLE
