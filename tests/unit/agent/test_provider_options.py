"""What an execution provider is given as options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.protocol.manifest import Manifest, ModelFormat, Precision, RuntimeName, Scheduling
from agent.runtimes.onnx import folder_for, options_for


def manifest(**changed: Any) -> Manifest:
    plain: dict[str, Any] = {"precision": Precision.FP32, "inputs": (), "outputs": ()}
    return Manifest(
        "a" * 64, 1, 1, "m", "1", "v", "p", ModelFormat.ONNX, RuntimeName.ONNX, **{**plain, **changed}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        (Precision.FP32, {}),
        (Precision.FP16, {"trt_fp16_enable": "1"}),
        (Precision.INT8, {"trt_int8_enable": "1", "trt_fp16_enable": "1"}),
    ],
)
def test_tensorrt_may_build_what_the_precision_says(precision: Precision, options: dict[str, str]) -> None:
    assert options_for("TensorrtExecutionProvider", manifest(precision=precision)) == options
    assert options_for("CUDAExecutionProvider", manifest(precision=precision)) == {}


def test_the_profiles_own_options_win_and_each_provider_gets_its_own() -> None:
    own = {
        "tensorrt": {"trt_fp16_enable": "0", "trt_engine_cache_enable": "1"},
        "OpenVINO": {"device_type": "NPU"},
        "CPUExecutionProvider": {"x": "y"},
    }
    made = manifest(precision=Precision.FP16, provider_options=own)
    assert options_for("TensorrtExecutionProvider", made) == {"trt_fp16_enable": "0", "trt_engine_cache_enable": "1"}
    assert options_for("OpenVINOExecutionProvider", made) == {"device_type": "NPU"}
    assert options_for("CPUExecutionProvider", made) == {"x": "y"}
    assert options_for("CUDAExecutionProvider", made) == {}


def test_memory_of_a_gpu_is_bounded_where_the_provider_can() -> None:
    made = manifest(scheduling=Scheduling(gpu_memory_mb=512), provider_options={"tensorrt": {"x": "y"}})
    assert options_for("CUDAExecutionProvider", made) == {"gpu_mem_limit": str(512 * 2**20)}
    assert options_for("TensorrtExecutionProvider", made) == {"trt_max_workspace_size": str(512 * 2**20), "x": "y"}
    assert options_for("CPUExecutionProvider", made) == {}
    own = manifest(scheduling=Scheduling(gpu_memory_mb=512), provider_options={"cuda": {"gpu_mem_limit": "1"}})
    assert options_for("CUDAExecutionProvider", own) == {"gpu_mem_limit": "1"}


def test_a_manifest_of_an_older_server_has_none() -> None:
    fields = msgspec.to_builtins(manifest())
    del fields["provider_options"]
    assert msgspec.convert(fields, Manifest).provider_options == {}


@pytest.mark.parametrize(
    ("provider", "name"),
    [
        ("TensorrtExecutionProvider", "trt_engine_cache_path"),
        ("TensorrtExecutionProvider", "trt_timing_cache_path"),
        ("OpenVINOExecutionProvider", "cache_dir"),
        ("CoreMLExecutionProvider", "ModelCacheDirectory"),
    ],
)
def test_what_a_provider_compiles_is_kept_where_the_profile_says_no_other_place(
    tmp_path: Path, provider: str, name: str
) -> None:
    folder = tmp_path / "{odd}"
    assert options_for(provider, manifest(), folder)[name] == str(folder)
    own = manifest(provider_options={provider: {name: "/elsewhere"}})
    assert options_for(provider, own, folder)[name] == "/elsewhere"
    assert name not in options_for(provider, manifest())
    assert options_for("CPUExecutionProvider", manifest(), folder) == {}


def test_a_folder_that_cant_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert folder_for("tensorrt", tmp_path / "file") is None
    assert folder_for("cpu", tmp_path / "compiled") is None
    assert not (tmp_path / "compiled").exists()
    made = folder_for("tensorrt", tmp_path / "compiled")
    assert made is not None
    assert list(made.iterdir()) == []
    assert made.parent.name.startswith("onnxruntime-")
