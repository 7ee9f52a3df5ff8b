"""Texts for Triton and KServe, read by Triton's own message and by the rules of Kubernetes names."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import yaml
from google.protobuf import text_format

from fleet_server.sdk import ExportError
from fleet_server.sdk.exporting import Served, inference_service, kubernetes_name, triton_config
from tests.triton_messages import ModelConfig

IMAGE = {"name": "x", "dtype": "float32", "shape": [-1, 3, 32, 32]}
SCORES = {"name": "scores", "dtype": "float32", "shape": [-1, 10]}
SERVED = Served("cifar", 2, [IMAGE], [SCORES], ["cat", "dog"], max_batch=32, threads=2, providers=["cpu"])


def parsed(served: Served) -> Any:
    return text_format.Parse(triton_config(served), ModelConfig())


def test_rows_are_batched() -> None:
    found = parsed(SERVED)
    assert (found.name, found.backend, found.max_batch_size) == ("cifar", "onnxruntime", 32)
    assert found.default_model_filename == "model.onnx"
    assert [(one.name, one.data_type, list(one.dims)) for one in found.input] == [("x", 11, [3, 32, 32])]
    assert [(one.name, list(one.dims), one.label_filename) for one in found.output] == [("scores", [10], "labels.txt")]
    assert found.HasField("dynamic_batching")
    assert found.parameters["intra_op_thread_count"].string_value == "2"
    assert [(one.kind, one.count) for one in found.instance_group] == [(found.instance_group[0].KIND_CPU, 1)]


def test_a_model_of_fixed_rows_is_not_batched_and_keeps_every_axis() -> None:
    found = parsed(replace(SERVED, inputs=[{**IMAGE, "shape": [1, 3, 32, 32]}]))
    assert found.max_batch_size == 0
    assert list(found.input[0].dims) == [1, 3, 32, 32]
    assert list(found.output[0].dims) == [-1, 10]
    assert not found.HasField("dynamic_batching")


def test_one_number_a_row_is_reshaped() -> None:
    found = parsed(replace(SERVED, inputs=[{"name": "age", "dtype": "int64", "shape": [-1]}]))
    assert list(found.input[0].dims) == [1]
    assert found.input[0].HasField("reshape")
    assert list(found.input[0].reshape.shape) == []


def test_tensorrt_is_an_accelerator_on_a_gpu() -> None:
    found = parsed(replace(SERVED, providers=["tensorrt", "cuda", "cpu"]))
    assert found.instance_group[0].kind == found.instance_group[0].KIND_GPU
    (accelerator,) = found.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt"


def test_names_are_quoted() -> None:
    name = 'a"\\b\n" max_batch_size: 7 #é'
    assert parsed(replace(SERVED, inputs=[{**IMAGE, "name": name}])).input[0].name == name


def test_a_type_that_triton_lacks_is_named() -> None:
    with pytest.raises(ExportError, match="input 'x' holds complex64"):
        triton_config(replace(SERVED, inputs=[{**IMAGE, "dtype": "complex64"}]))


def test_an_inference_service_names_the_repository() -> None:
    found = yaml.safe_load(yaml.safe_dump(inference_service(SERVED, "s3://models/cifar/models")))
    model = found["spec"]["predictor"]["model"]
    assert model["storageUri"] == "s3://models/cifar/models"
    assert model["runtime"] == "kserve-tritonserver"
    assert "resources" not in model
    asked = inference_service(replace(SERVED, providers=["cuda"]), "s3://m")
    assert asked["spec"]["predictor"]["model"]["resources"] == {"limits": {"nvidia.com/gpu": "1"}}


@pytest.mark.parametrize("name", ["Cifar_Net.v2", "3d", "x" * 100, "a." * 60, "ß", "9" * 80])
def test_names_become_those_of_kubernetes(name: str) -> None:
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", kubernetes_name(name))
