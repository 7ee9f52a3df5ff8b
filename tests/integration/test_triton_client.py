"""Everything of `tritonclient[http]` that makes sense on a device, unchanged, against a real worker."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException

from agent.protocol.manifest import TensorSpec
from agent.serving.framing import FrameChannel
from tests.fleet import write_classifier
from tests.serving_worker import described, running_worker, serve, write_echo, write_sums

VALUES: dict[str, Any] = {
    "float32": np.array([[0.5, -1.25, 3e7]], np.float32),
    "float16": np.array([[0.5, -1.25, 60000]], np.float16),
    "uint8": np.array([[0, 7, 255]], np.uint8),
    "int64": np.array([[-(2**63), 2**53 + 1, 2**63 - 1]], np.int64),
    "bool": np.array([[True, False, True]], bool),
    "string": np.array([["", "été 🐟", "a\0b"]], object),
}
NAMES = {
    "float32": "FP32",
    "float16": "FP16",
    "uint8": "UINT8",
    "int64": "INT64",
    "bool": "BOOL",
    "string": "BYTES",
}
LABELS = ("cat", "dog", "fish")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FrameChannel, str]]:
    """A worker with an echo of each dtype, a model of two inputs, and a classifier with labels."""
    folder = tmp_path_factory.mktemp("models")
    with running_worker() as (channel, address, _):
        for dtype in VALUES:
            serve(channel, write_echo(folder / dtype, dtype), folder / dtype)
        serve(channel, write_sums(folder / "sums"), folder / "sums")
        write_classifier(folder / "classes")
        specs = (TensorSpec("x", "float32", (-1, 8)),), (TensorSpec("scores", "float32", (-1, 3)),)
        serve(channel, described("classes", *specs, labels=LABELS), folder / "classes")
        serve(
            channel,
            described("classes", *specs, labels=LABELS, version="2", digest="b" * 64),
            folder / "classes",
            activate=False,
        )
        yield channel, address


@pytest.fixture
def client(served: tuple[FrameChannel, str]) -> Iterator[triton.InferenceServerClient]:
    with contextlib.closing(triton.InferenceServerClient(served[1])) as found:
        yield found


def tensor(name: str, value: Any, kind: str, *, binary: bool = True) -> triton.InferInput:
    made = triton.InferInput(name, list(value.shape), kind)
    made.set_data_from_numpy(value, binary_data=binary)
    return made


def read(result: Any, name: str) -> Any:
    """An output as it was sent: BYTES come back as bytes where they were binary, as text where they were JSON."""
    value = result.as_numpy(name)
    if value.dtype == object:
        return np.array([[text.decode() if isinstance(text, bytes) else text for text in row] for row in value], object)
    return value


@pytest.mark.parametrize("answered", [True, False], ids=["binary-out", "json-out"])
@pytest.mark.parametrize("asked", [True, False], ids=["binary-in", "json-in"])
@pytest.mark.parametrize("dtype", sorted(VALUES))
def test_every_dtype_goes_in_and_comes_out_as_it_was(
    client: triton.InferenceServerClient, dtype: str, asked: bool, answered: bool
) -> None:
    value = np.repeat(VALUES[dtype], 3, axis=0)
    result = client.infer(
        f"echo-{dtype}",
        [tensor("x", value, NAMES[dtype], binary=asked)],
        outputs=[triton.InferRequestedOutput("y", binary_data=answered)],
        request_id="mine",
    )
    assert result.get_response()["id"] == "mine"
    assert result.get_output("y")["datatype"] == NAMES[dtype]
    assert read(result, "y").tolist() == value.tolist()


def test_server_and_models_are_described(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready(query_params={"a": "b c"})
    assert client.is_model_ready("classes")
    assert client.is_model_ready("classes", "1")
    assert not client.is_model_ready("classes", "7")
    about = client.get_server_metadata()
    assert about["name"] == "shoal-agent"
    assert {"classification", "statistics", "system_shared_memory", "model_repository"} <= set(about["extensions"])
    assert client.get_model_metadata("echo-string")["inputs"] == [{"name": "x", "datatype": "BYTES", "shape": [-1, -1]}]
    config = client.get_model_config("classes")
    assert config["max_batch_size"] == 8
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [8]}]
    assert client.get_model_config("echo-string")["output"][0]["data_type"] == "TYPE_STRING"


def test_the_index_names_what_answers_and_what_is_only_loaded(client: triton.InferenceServerClient) -> None:
    entries = [one for one in client.get_model_repository_index() if one["name"] == "classes"]
    assert [(one["version"], one["state"]) for one in entries] == [("1", "READY"), ("2", "UNAVAILABLE")]
    assert "version 1 answers" in entries[1]["reason"]
    response = client._post("v2/repository/index", '{"ready": true}', None, None)
    ready = msgspec.json.decode(bytes(response.read()))
    assert {one["state"] for one in ready} == {"READY"}
    assert len(ready) == len(VALUES) + 2


def test_what_runs_is_not_a_clients_to_change(client: triton.InferenceServerClient) -> None:
    client.load_model("classes")
    with pytest.raises(InferenceServerException, match="does not run here") as unknown:
        client.load_model("nobody")
    assert unknown.value.status() == "404"
    with pytest.raises(InferenceServerException, match="config: what runs here is decided by the fleet server"):
        client.load_model("classes", config="{}")
    with pytest.raises(InferenceServerException, match="fleet server wants it") as refused:
        client.unload_model("classes")
    assert refused.value.status() == "403"
    with pytest.raises(InferenceServerException, match="does not run here"):
        client.unload_model("nobody")
    assert client.is_model_ready("classes")


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: client.get_trace_settings(),
        lambda client: client.update_trace_settings("classes", {"trace_rate": "1"}),
        lambda client: client.get_log_settings(),
        lambda client: client.update_log_settings({"log_verbose_level": 1}),
        lambda client: client.get_cuda_shared_memory_status(),
        lambda client: client.register_cuda_shared_memory("r", b"handle", 0, 8),
    ],
)
def test_what_is_not_offered_says_so(client: triton.InferenceServerClient, ask: Any) -> None:
    with pytest.raises(InferenceServerException, match="not offered") as refused:
        ask(client)
    assert refused.value.status() == "404"


def test_statistics_are_what_was_asked(client: triton.InferenceServerClient) -> None:
    def counted() -> dict[str, Any]:
        (found,) = client.get_inference_statistics("sums", "1")["model_stats"]
        return dict(found)

    def ask(rows: int) -> None:
        value = np.ones((rows, 2), np.float32)
        client.infer("sums", [tensor("a", value, "FP32"), tensor("b", value, "FP32")])

    before = counted()
    ask(1)
    ask(3)
    after = counted()
    assert after["inference_count"] - before["inference_count"] == 4
    assert after["execution_count"] - before["execution_count"] == 2
    stats = after["inference_stats"]
    assert stats["success"]["count"] - before["inference_stats"]["success"]["count"] == 2
    assert stats["fail"]["count"] == 0
    assert stats["success"]["ns"] >= stats["compute_infer"]["ns"] > 0
    sizes = {one["batch_size"]: one["compute_infer"]["count"] for one in after["batch_stats"]}
    assert sizes[3] == 1
    assert after["last_inference"] > 1e12
    names = [(one["name"], one["version"]) for one in client.get_inference_statistics()["model_stats"]]
    assert ("classes", "2") in names
    assert len(client.get_inference_statistics("classes")["model_stats"]) == 2
    with pytest.raises(InferenceServerException, match="does not run here"):
        client.get_inference_statistics("nobody")


def test_outputs_are_those_asked_for_in_that_order(client: triton.InferenceServerClient) -> None:
    a, b = np.array([[5, 6]], np.float32), np.array([[1, 2]], np.float32)
    inputs = [tensor("b", b, "FP32", binary=False), tensor("a", a, "FP32")]
    both = client.infer("sums", inputs)
    assert both.as_numpy("sum").tolist() == [[6, 8]]
    assert both.as_numpy("difference").tolist() == [[4, 4]]
    order = [triton.InferRequestedOutput("difference"), triton.InferRequestedOutput("sum", binary_data=False)]
    mixed = client.infer("sums", inputs, outputs=order)
    assert [one["name"] for one in mixed.get_response()["outputs"]] == ["difference", "sum"]
    assert "data" in mixed.get_output("sum")
    only = client.infer("sums", inputs, outputs=order[:1])
    assert only.as_numpy("sum") is None
    with pytest.raises(InferenceServerException, match="asked for twice"):
        client.infer("sums", inputs, outputs=[order[0], order[0]])


def test_requests_that_do_not_wait(client: triton.InferenceServerClient) -> None:
    with contextlib.closing(
        triton.InferenceServerClient(client._parsed_url.host + f":{client._parsed_url.port}", concurrency=4)
    ) as many:
        values = [np.full((1, 3), number, np.float32) for number in range(20)]
        asked = [many.async_infer("echo-float32", [tensor("x", value, "FP32")]) for value in values]
        answers = [one.get_result().as_numpy("y").tolist() for one in asked]
    assert answers == [value.tolist() for value in values]


def test_classes_with_labels(client: triton.InferenceServerClient) -> None:
    rows = np.array([[0.1, 0.9, 0.2, 0, 0, 0, 0, 0], [0.7, 0.1, 0.3, 0, 0, 0, 0, 0]], np.float32)
    scores = client.infer("classes", [tensor("x", rows, "FP32")]).as_numpy("scores")
    for binary in (True, False):
        wanted = triton.InferRequestedOutput("scores", binary_data=binary, class_count=2)
        found = read(client.infer("classes", [tensor("x", rows, "FP32")], outputs=[wanted]), "scores")
        assert found.shape == (2, 2)
        for row, texts in zip(scores, found, strict=True):
            order = np.argsort(-row)
            assert list(texts) == [f"{row[index]:f}:{index}:{LABELS[index]}" for index in order[:2]]
    every = triton.InferRequestedOutput("scores", class_count=100)
    assert client.infer("classes", [tensor("x", rows, "FP32")], outputs=[every]).as_numpy("scores").shape == (2, 3)
    names = triton.InferRequestedOutput("y", class_count=2)
    with pytest.raises(InferenceServerException, match="classification needs numbers"):
        client.infer("echo-string", [tensor("x", VALUES["string"], "BYTES")], outputs=[names])


@pytest.mark.parametrize("request_by", ["gzip", "deflate", None])
@pytest.mark.parametrize("answer_by", ["gzip", "deflate", None])
def test_compressed_bodies(client: triton.InferenceServerClient, request_by: str, answer_by: str) -> None:
    value = np.arange(3000, dtype=np.float32).reshape(1, -1)
    result = client.infer(
        "echo-float32",
        [tensor("x", value, "FP32")],
        request_compression_algorithm=request_by,
        response_compression_algorithm=answer_by,
    )
    assert result.as_numpy("y").tolist() == value.tolist()


@pytest.fixture
def region(client: triton.InferenceServerClient) -> Iterator[tuple[str, Any]]:
    """4 KiB of shared memory that are registered as `mine`: their key, and the client's handle."""
    key = f"/shoal-test-{uuid.uuid4().hex[:12]}"
    handle = shm.create_shared_memory_region("mine", key, 4096, create_only=True)
    try:
        client.register_system_shared_memory("mine", key, 4096)
        yield key, handle
    finally:
        client.unregister_system_shared_memory()
        shm.destroy_shared_memory_region(handle)


@pytest.mark.parametrize("dtype", sorted(VALUES))
def test_tensors_in_shared_memory(client: triton.InferenceServerClient, region: tuple[str, Any], dtype: str) -> None:
    value, handle = VALUES[dtype], region[1]
    from tritonclient.utils import serialize_byte_tensor

    content = serialize_byte_tensor(value) if dtype == "string" else value
    size = len(content.item()) if dtype == "string" else content.nbytes
    shm.set_shared_memory_region(handle, [content], offset=64)
    asked = triton.InferInput("x", list(value.shape), NAMES[dtype])
    asked.set_shared_memory("mine", size, offset=64)
    wanted = triton.InferRequestedOutput("y")
    wanted.set_shared_memory("mine", 1024, offset=2048)
    said = client.infer(f"echo-{dtype}", [asked], outputs=[wanted]).get_output("y")
    assert said["parameters"] == {
        "shared_memory_region": "mine",
        "shared_memory_byte_size": size,
        "shared_memory_offset": 2048,
    }
    found = shm.get_contents_as_numpy(handle, value.dtype, value.shape, offset=2048)
    if dtype == "string":
        assert [[text.decode() for text in row] for row in found] == value.tolist()
    else:
        assert found.tolist() == value.tolist()


def test_regions_are_listed_and_forgotten(client: triton.InferenceServerClient, region: tuple[str, Any]) -> None:
    said = {"name": "mine", "key": region[0], "offset": 0, "byte_size": 4096}
    assert client.get_system_shared_memory_status() == [said]
    assert client.get_system_shared_memory_status("mine") == [said]
    with pytest.raises(InferenceServerException, match="unregister it first"):
        client.register_system_shared_memory("mine", region[0], 4096)
    client.unregister_system_shared_memory("mine")
    client.unregister_system_shared_memory("mine")
    assert client.get_system_shared_memory_status() == []
    with pytest.raises(InferenceServerException, match="not registered"):
        client.get_system_shared_memory_status("mine")


def test_a_region_that_shrinks_ends_no_worker(client: triton.InferenceServerClient, region: tuple[str, Any]) -> None:
    """A mapping would: touching what is gone is a SIGBUS."""
    asked = triton.InferInput("x", [1, 8], "FP32")
    asked.set_shared_memory("mine", 32, offset=1024)
    wanted = triton.InferRequestedOutput("y")
    wanted.set_shared_memory("mine", 32)
    assert client.infer("echo-float32", [asked], outputs=[wanted])
    os.truncate(Path("/dev/shm") / region[0][1:], 512)
    with pytest.raises(InferenceServerException, match="smaller than it was registered"):
        client.infer("echo-float32", [asked], outputs=[wanted])
    wanted.set_shared_memory("mine", 32, offset=1024)
    with pytest.raises(InferenceServerException, match="smaller than it was registered"):
        client.infer("echo-float32", [tensor("x", np.zeros((1, 8), np.float32), "FP32")], outputs=[wanted])
    assert client.is_server_live()


def test_what_does_not_lie_in_a_region_is_refused(
    client: triton.InferenceServerClient, region: tuple[str, Any]
) -> None:
    for size, offset, said in ((4097, 0, "beyond its 4096"), (32, 4090, "beyond"), (32, 2**61, "beyond")):
        asked = triton.InferInput("x", [1, 8], "FP32")
        asked.set_shared_memory("mine", size, offset=offset)
        with pytest.raises(InferenceServerException, match=said):
            client.infer("echo-float32", [asked])
    asked = triton.InferInput("x", [1, 8], "FP32")
    asked.set_shared_memory("mine", 64)
    with pytest.raises(InferenceServerException, match="64 bytes, and 32 are taken"):
        client.infer("echo-float32", [asked])
    asked.set_shared_memory("mine", 32)
    wanted = triton.InferRequestedOutput("y")
    wanted.set_shared_memory("mine", 16)
    with pytest.raises(InferenceServerException, match="has 32 bytes: shared_memory_byte_size leaves room for 16"):
        client.infer("echo-float32", [asked], outputs=[wanted])
