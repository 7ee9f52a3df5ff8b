"""`tritonclient.grpc`, unchanged, and hostile clients against a real worker that serves gRPC too."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.http as triton_http
import tritonclient.utils.shared_memory as shm
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, serialize_byte_tensor

from agent.grpc_config import GrpcConfig
from agent.problems import GRPC_NOT_SERVED
from agent.protocol.lifecycle import Phase
from agent.protocol.manifest import Manifest, Scheduling, TensorSpec
from agent.protocol.messages import Exposure, ExposureMode
from agent.serving.exchange import BODY_LIMIT
from agent.serving.ipc import Collect, Expect, Expose, Exposed, Unload, Window
from tests.fleet import free_port, wait_until, write_classifier
from tests.real_device import RealDevice
from tests.serving_worker import ServingWorker, described, serve, start_worker, write_echo, write_sums
from tests.traps import write_trapped

VALUES: dict[str, Any] = {
    "float32": np.array([[0.5, -1.25, 3e7]], np.float32),
    "float16": np.array([[0.5, -1.25, 60000]], np.float16),
    "uint8": np.array([[0, 7, 255]], np.uint8),
    "int64": np.array([[-(2**63), 2**53 + 1, 2**63 - 1]], np.int64),
    "bool": np.array([[True, False, True]], bool),
    "string": np.array([["", "été 🐟", "a\0b"]], object),
}
NAMES = {"float32": "FP32", "float16": "FP16", "uint8": "UINT8", "int64": "INT64", "bool": "BOOL", "string": "BYTES"}
CONTENTS = {
    "float32": "fp32_contents", "uint8": "uint_contents", "int64": "int64_contents", "bool": "bool_contents",
    "string": "bytes_contents",
}  # fmt: skip
ROW = np.array([[0.1, 0.9, 0.2, 0, 0, 0, 0, 0]], np.float32)
ARMED = np.array([[0, 0, 0, 0, 0, 0, 0, 60]], np.float32)
SPECS = (TensorSpec("x", "float32", (-1, 8)),), (TensorSpec("scores", "float32", (-1, 3)),)


@contextlib.contextmanager
def running(*addresses: str, environment: dict[str, str] | None = None) -> Iterator[ServingWorker]:
    """A worker with nothing loaded; it must end well."""
    worker = start_worker(grpc=addresses or ("127.0.0.1:0",), environment=environment)
    try:
        yield worker
    finally:
        worker.channel.close()
        assert worker.process.wait(20) == 0


def at(worker: ServingWorker) -> str:
    assert worker.grpc is not None
    assert worker.grpc.problem == ""
    return worker.grpc.address.partition(",")[0]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServingWorker]:
    """One with an echo of each dtype, a model of two inputs, a classifier with labels, and models that do badly."""
    folder = tmp_path_factory.mktemp("models")
    with running() as found:
        for dtype in VALUES:
            serve(found.channel, write_echo(folder / dtype, dtype), folder / dtype)
        serve(found.channel, write_sums(folder / "sums"), folder / "sums")
        write_classifier(folder / "classes")
        for version, more in (("1", {}), ("2", {"digest": "b" * 64})):
            manifest = described("classes", *SPECS, labels=("cat", "dog", "fish"), version=version, **more)
            serve(found.channel, manifest, folder / "classes", activate=version == "1")
        write_trapped(folder / "error", "error")
        serve(found.channel, described("error", *SPECS), folder / "error")
        write_trapped(folder / "slow", "slow", rounds=20_000)
        slow = described("slow", *SPECS, max_batch=1, scheduling=Scheduling(queue_limit=2))
        serve(found.channel, slow, folder / "slow")
        write_trapped(folder / "slower", "slow", rounds=500_000)
        serve(found.channel, described("slower", *SPECS, max_batch=1), folder / "slower")
        found.channel.send(Expect(("late",)))
        yield found


@pytest.fixture
def client(worker: ServingWorker) -> Iterator[triton.InferenceServerClient]:
    with contextlib.closing(triton.InferenceServerClient(at(worker))) as found:
        yield found


@pytest.fixture
def stub(worker: ServingWorker) -> Iterator[Any]:
    """For messages that tritonclient would not send."""
    with grpc.insecure_channel(at(worker), options=[("grpc.max_send_message_length", -1)]) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def tensor(name: str, value: Any, kind: str) -> triton.InferInput:
    made = triton.InferInput(name, list(value.shape), kind)
    made.set_data_from_numpy(value)
    return made


def texts(value: Any) -> Any:
    if value.dtype != object:
        return value.tolist()
    return [[text.decode() if isinstance(text, bytes) else text for text in row] for row in value]


@pytest.mark.parametrize("dtype", sorted(VALUES))
def test_every_dtype_goes_in_and_comes_out_as_it_was(client: triton.InferenceServerClient, dtype: str) -> None:
    value = np.repeat(VALUES[dtype], 3, axis=0)
    result = client.infer(f"echo-{dtype}", [tensor("x", value, NAMES[dtype])], request_id="mine")
    assert result.get_response().id == "mine"
    assert result.get_response().model_version == "1"
    assert result.get_output("y").datatype == NAMES[dtype]
    assert texts(result.as_numpy("y")) == value.tolist()


@pytest.mark.parametrize("dtype", sorted(CONTENTS))
def test_typed_contents(stub: Any, dtype: str) -> None:
    request = service_pb2.ModelInferRequest(model_name=f"echo-{dtype}")
    asked = request.inputs.add(name="x", datatype=NAMES[dtype], shape=[1, 3])
    flat = VALUES[dtype].reshape(-1).tolist()
    values = [one.encode() for one in flat] if dtype == "string" else flat
    getattr(asked.contents, CONTENTS[dtype]).extend(values)
    answer = stub.ModelInfer(request)
    expected = serialize_byte_tensor(VALUES[dtype]).item() if dtype == "string" else VALUES[dtype].tobytes()
    assert list(answer.raw_output_contents) == [expected]


def test_server_and_models_are_described(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("classes")
    assert client.is_model_ready("classes", "1")
    assert not client.is_model_ready("classes", "7")
    assert not client.is_model_ready("late")
    about = client.get_server_metadata(as_json=True)
    assert about["name"] == "shoal-agent"
    assert {"classification", "statistics", "system_shared_memory"} <= set(about["extensions"])
    assert "images" not in about["extensions"]
    said = client.get_model_metadata("echo-string")
    assert [(one.name, one.datatype, list(one.shape)) for one in said.inputs] == [("x", "BYTES", [-1, -1])]
    config = client.get_model_config("classes").config
    assert config.max_batch_size == 8
    assert list(config.input[0].dims) == [8]
    assert client.get_model_config("echo-string", as_json=True)["config"]["output"][0]["data_type"] == "TYPE_STRING"


def test_the_index_and_the_statistics(client: triton.InferenceServerClient) -> None:
    entries = [one for one in client.get_model_repository_index().models if one.name == "classes"]
    assert [(one.version, one.state) for one in entries] == [("1", "READY"), ("2", "UNAVAILABLE")]
    value = np.ones((3, 2), np.float32)
    (before,) = client.get_inference_statistics("sums", "1").model_stats
    client.infer("sums", [tensor("a", value, "FP32"), tensor("b", value, "FP32")])
    (after,) = client.get_inference_statistics("sums", "1").model_stats
    assert after.inference_count - before.inference_count == 3
    assert after.inference_stats.success.count - before.inference_stats.success.count == 1
    assert len(client.get_inference_statistics("classes").model_stats) == 2
    assert len(client.get_inference_statistics().model_stats) > 8


def test_outputs_are_those_asked_for_in_that_order(client: triton.InferenceServerClient) -> None:
    a, b = np.array([[5, 6]], np.float32), np.array([[1, 2]], np.float32)
    inputs = [tensor("b", b, "FP32"), tensor("a", a, "FP32")]
    both = client.infer("sums", inputs)
    assert both.as_numpy("sum").tolist() == [[6, 8]]
    assert both.as_numpy("difference").tolist() == [[4, 4]]
    order = [triton.InferRequestedOutput("difference"), triton.InferRequestedOutput("sum")]
    assert [one.name for one in client.infer("sums", inputs, outputs=order).get_response().outputs] == [
        "difference",
        "sum",
    ]
    assert client.infer("sums", inputs, outputs=order[:1]).as_numpy("sum") is None
    with pytest.raises(InferenceServerException, match="asked for twice"):
        client.infer("sums", inputs, outputs=[order[0], order[0]])


def test_classes_with_labels(client: triton.InferenceServerClient) -> None:
    scores = client.infer("classes", [tensor("x", ROW, "FP32")]).as_numpy("scores")[0]
    wanted = triton.InferRequestedOutput("scores", class_count=2)
    found = texts(client.infer("classes", [tensor("x", ROW, "FP32")], outputs=[wanted]).as_numpy("scores"))
    labels = ("cat", "dog", "fish")
    assert found == [[f"{scores[index]:f}:{index}:{labels[index]}" for index in np.argsort(-scores)[:2]]]


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


def test_tensors_in_shared_memory(client: triton.InferenceServerClient, region: tuple[str, Any]) -> None:
    a, b = np.array([[5, 6]], np.float32), np.array([[1, 2]], np.float32)
    shm.set_shared_memory_region(region[1], [a], offset=64)
    asked = triton.InferInput("a", [1, 2], "FP32")
    asked.set_shared_memory("mine", 8, offset=64)
    wanted = triton.InferRequestedOutput("sum")
    wanted.set_shared_memory("mine", 1024, offset=2048)
    outputs = [wanted, triton.InferRequestedOutput("difference")]
    result = client.infer("sums", [asked, tensor("b", b, "FP32")], outputs=outputs)
    said = result.get_output("sum").parameters
    assert said["shared_memory_region"].string_param == "mine"
    assert said["shared_memory_byte_size"].int64_param == 8
    assert said["shared_memory_offset"].int64_param == 2048
    assert shm.get_contents_as_numpy(region[1], np.float32, [1, 2], offset=2048).tolist() == [[6, 8]]
    assert result.as_numpy("difference").tolist() == [[4, 4]]
    asked.set_shared_memory("mine", 8, offset=4092)
    with pytest.raises(InferenceServerException, match="beyond its 4096 bytes"):
        client.infer("sums", [asked, tensor("b", b, "FP32")])


def test_regions_are_listed_and_forgotten(client: triton.InferenceServerClient, region: tuple[str, Any]) -> None:
    for name in ("", "mine"):
        (one,) = client.get_system_shared_memory_status(name).regions.values()
        assert (one.name, one.key, one.offset, one.byte_size) == ("mine", region[0], 0, 4096)
    with pytest.raises(InferenceServerException, match="unregister it first"):
        client.register_system_shared_memory("mine", region[0], 4096)
    client.unregister_system_shared_memory("mine")
    assert not client.get_system_shared_memory_status().regions
    with pytest.raises(InferenceServerException, match="not registered"):
        client.get_system_shared_memory_status("mine")


def request(model: str = "classes", raw: bytes = ROW.tobytes(), **changes: Any) -> Any:
    made = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=[raw])
    made.inputs.add(**{"name": "x", "datatype": "FP32", "shape": [1, 8], **changes})
    return made


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (request(name="z"), "inputs: the model has no input 'z', but x"),
        (request(datatype="INT64"), "input 'x' has datatype 'INT64', the model takes FP32"),
        (request(datatype="NONSENSE" * 100), "has datatype"),
        (request(shape=[1, 7]), r"input 'x' has shape \[1, 7\], the model takes \[-1, 8\]"),
        (request(shape=[-1, 8]), "has no usable shape"),
        (request(shape=[2**62, 8]), "has no usable shape"),
        (request(shape=[10**9, 8]), "32 bytes, and 32000000000 are taken"),
        (request(raw=ROW.tobytes()[:-1]), "it has 31 bytes, and 32 are taken"),
        (request(raw=ROW.tobytes() + b"\0"), "it has 33 bytes, and 32 are taken"),
        (request("echo-string", b"\xff\xff\xff\x7fabc", datatype="BYTES", shape=[1, 1]), "longer than the data"),
        (request("echo-string", b"", datatype="BYTES", shape=[10**9, 1]), "a tensor may have 1048576 strings"),
        (request("echo-string", b"\1\0\0\0\xff", datatype="BYTES", shape=[1, 1]), "is not UTF-8"),
        (service_pb2.ModelInferRequest(model_name="classes"), "inputs: x is missing"),
        (service_pb2.ModelInferRequest(), "model_name: it has 0 characters"),
        (service_pb2.ModelInferRequest(model_name="classes", raw_input_contents=[b""]), "raw_input_contents"),
        (service_pb2.ModelInferRequest(model_name="classes", id="i" * 300), "id: it may have 256 characters"),
    ],
)
def test_what_does_not_fit_is_named(stub: Any, asked: Any, said: str) -> None:
    with pytest.raises(grpc.RpcError, match=said) as error:
        stub.ModelInfer(asked)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert stub.ServerLive(service_pb2.ServerLiveRequest()).live


def test_bytes_that_are_no_message(worker: ServingWorker) -> None:
    with grpc.insecure_channel(at(worker)) as channel:
        for name in ("ModelInfer", "ModelReady", "SystemSharedMemoryRegister"):
            ask = channel.unary_unary(f"/inference.GRPCInferenceService/{name}")
            with pytest.raises(grpc.RpcError, match="no protocol buffer") as error:
                ask(b"\xff\xff\xff")
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        nothing = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")
        with pytest.raises(grpc.RpcError, match="has one message, and there is none"):
            nothing(iter(()))


def test_messages_are_bounded(stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as error:
        stub.ModelInfer(request(raw=bytes(BODY_LIMIT)))
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    many = service_pb2.ModelInferRequest(model_name="classes")
    for _ in range(40_000):
        many.inputs.add()
    with pytest.raises(grpc.RpcError, match="more than 1024 fields") as refused:
        stub.ModelInfer(many)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as compressed:
        stub.ModelInfer(request(), compression=grpc.Compression.Gzip)
    assert compressed.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("ask", "code", "said"),
    [
        (lambda client: client.get_model_metadata("nobody"), "NOT_FOUND", "does not run here; models that do:"),
        (lambda client: client.get_model_metadata("classes", "7"), "NOT_FOUND", "classes in version 7"),
        (lambda client: client.get_model_metadata("late"), "UNAVAILABLE", "is not loaded at the moment"),
        (lambda client: client.unload_model("classes"), "PERMISSION_DENIED", "the fleet server wants it"),
        (lambda client: client.load_model("classes", config="{}"), "PERMISSION_DENIED", "config: what runs here"),
        (lambda client: client.load_model("nobody"), "NOT_FOUND", "does not run here"),
        (lambda client: client.get_trace_settings(), "UNIMPLEMENTED", "not offered"),
        (lambda client: client.get_log_settings(), "UNIMPLEMENTED", "not offered"),
        (lambda client: client.get_cuda_shared_memory_status(), "UNIMPLEMENTED", "not offered"),
        (lambda client: client.infer("error", [tensor("x", ARMED, "FP32")]), "INTERNAL", "the model failed"),
        (lambda client: client.infer("error", [tensor("x", ROW, "FP32")], priority=101), "INVALID_ARGUMENT", "priorit"),
    ],
)
def test_errors_have_their_status(client: triton.InferenceServerClient, ask: Any, code: str, said: str) -> None:
    with pytest.raises(InferenceServerException, match=said) as error:
        ask(client)
    assert error.value.status() == f"StatusCode.{code}"


def test_a_load_of_what_serves_is_well(client: triton.InferenceServerClient) -> None:
    client.load_model("classes")
    assert client.is_model_ready("classes")


def test_errors_say_what_http_says(worker: ServingWorker, client: triton.InferenceServerClient) -> None:
    wrong = np.zeros((1, 7), np.float32)
    with pytest.raises(InferenceServerException) as by_grpc:
        client.infer("classes", [tensor("x", wrong, "FP32")])
    by_http = triton_http.InferInput("x", [1, 7], "FP32")
    by_http.set_data_from_numpy(wrong)
    other = triton_http.InferenceServerClient(worker.url.removeprefix("http://"))
    with contextlib.closing(other), pytest.raises(InferenceServerException) as same:
        other.infer("classes", [by_http])
    assert by_grpc.value.message() == same.value.message()


def test_who_comes_to_a_full_queue_is_told_when_to_come_again(stub: Any) -> None:
    calls = [stub.ModelInfer.future(request("slow", ARMED.tobytes())) for _ in range(12)]
    codes = [call.code() for call in calls]
    assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    refused = calls[codes.index(grpc.StatusCode.RESOURCE_EXHAUSTED)]
    assert "too many requests wait for this model" in refused.details()
    assert int(dict(refused.trailing_metadata())["retry-after"]) >= 1


def statistics(stub: Any, model: str) -> Any:
    (found,) = stub.ModelStatistics(service_pb2.ModelStatisticsRequest(name=model)).model_stats
    return found.inference_stats


def test_a_deadline_is_the_requests(stub: Any) -> None:
    """Who waits in the queue when it is over leaves it: the model never sees it."""
    running = stub.ModelInfer.future(request("slower", ARMED.tobytes()))
    time.sleep(0.1)
    with pytest.raises(grpc.RpcError) as error:
        stub.ModelInfer(request("slower", ARMED.tobytes()), timeout=0.4)
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    asked = request("slower", ARMED.tobytes())
    asked.parameters["timeout"].int64_param = 1000
    with pytest.raises(grpc.RpcError, match=r"its turn did not come within the 0\.001 s") as told:
        stub.ModelInfer(asked, timeout=60)
    assert told.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert running.result()
    wait_until("the last of them", lambda: statistics(stub, "slower").fail.count == 2)
    assert statistics(stub, "slower").success.count == 1


def test_no_request_is_lost_over_swaps(tmp_path: Path) -> None:
    write_classifier(tmp_path / "model")

    def version(number: int) -> Manifest:
        return described("tri", *SPECS, version=str(number), digest="ab"[number % 2] * 64)

    stop, answers, failures = threading.Event(), [], []

    def ask(address: str) -> None:
        with contextlib.closing(triton.InferenceServerClient(address)) as client:
            while not stop.is_set():
                try:
                    answers.append(client.infer("tri", [tensor("x", ROW, "FP32")]).get_response().model_version)
                except Exception as error:
                    failures.append(error)

    with running() as worker:
        serve(worker.channel, version(0), tmp_path / "model")
        threads = [threading.Thread(target=ask, args=(at(worker),)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for number in range(1, 21):
            serve(worker.channel, version(number), tmp_path / "model")
            worker.channel.send(Unload("tri", version(number - 1).digest))
        stop.set()
        for thread in threads:
            thread.join(30)
        assert failures == []
        assert len(set(answers)) > 5
        worker.channel.send(Collect(3))
        window = worker.channel.receive()
        assert isinstance(window, Window)
        assert all(model.errors == 0 for model in window.models)


def test_a_version_beside_is_given_copies(tmp_path: Path) -> None:
    write_classifier(tmp_path / "model")
    with running() as worker, contextlib.closing(triton.InferenceServerClient(at(worker))) as client:
        for number, letter in enumerate("ab"):
            manifest = described("tri", *SPECS, version=str(number), digest=letter * 64)
            serve(worker.channel, manifest, tmp_path / "model", activate=number == 0)
        worker.channel.send(Expose(3, "tri", "b" * 64, Exposure(ExposureMode.SHADOW, 1.0)))
        assert worker.channel.receive() == Exposed(3, ok=True)
        for _ in range(5):
            assert client.infer("tri", [tensor("x", ROW, "FP32")]).get_response().model_version == "0"
        counted: dict[str, int] = {"0": 0, "1": 0}

        def copied() -> bool:
            worker.channel.send(Collect(4))
            window = worker.channel.receive()
            assert isinstance(window, Window)
            for one in window.models:
                counted[one.version] += one.requests
            return counted["1"] > 0

        wait_until("copies", copied)
        assert counted["0"] == 5


def test_a_unix_socket_too_and_memory_for_the_device_alone(tmp_path: Path) -> None:
    """Who comes by the network's address is no program of the device, though it is one here."""
    path = tmp_path / "grpc.sock"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent: it tells which address of this machine would be used
        except OSError:
            pytest.skip("this machine has no network")
        outside = probe.getsockname()[0]
    with running("0.0.0.0:0", f"unix:{path}") as worker:
        port = at(worker).rpartition(":")[2]
        assert worker.grpc is not None
        assert worker.grpc.address.endswith(f"unix:{path}")
        for address, may in ((f"unix:{path}", True), (f"127.0.0.1:{port}", True), (f"{outside}:{port}", False)):
            with contextlib.closing(triton.InferenceServerClient(address)) as client:
                assert client.is_server_live()
                if may:
                    assert not client.get_system_shared_memory_status().regions
                    continue
                with pytest.raises(InferenceServerException, match="programs on this device") as refused:
                    client.get_system_shared_memory_status()
                assert refused.value.status() == "StatusCode.PERMISSION_DENIED"


def serves_http(worker: ServingWorker) -> bool:
    with contextlib.closing(triton_http.InferenceServerClient(worker.url.removeprefix("http://"))) as client:
        return bool(client.is_server_live())


def test_an_address_that_is_taken_leaves_http(tmp_path: Path) -> None:
    with running() as first, running(at(first)) as second:
        assert second.grpc is not None
        assert second.grpc.address == ""
        assert f"{at(first)} can't be had" in second.grpc.problem
        assert "grpc.listen" in second.grpc.problem
        assert serves_http(second)


def test_a_library_that_is_missing_leaves_http(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['grpc'] = None\n")
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    with running(environment={"PYTHONPATH": paths}) as worker:
        assert worker.grpc is not None
        assert "pip install 'shoal[grpc]'" in worker.grpc.problem
        assert serves_http(worker)


def test_a_worker_that_starts_again_serves_at_the_same_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls meanwhile are refused, or wait where the client says so; who asks again is answered."""
    write_classifier(tmp_path / "1.onnx")
    place = f"127.0.0.1:{free_port()}"
    with RealDevice(tmp_path / "state", monkeypatch, grpc=GrpcConfig(serve=True, listen=place)) as device:
        device.desire(device.deployment("d1", tmp_path / "1.onnx", "1"))
        device.await_phase("d1", Phase.ACTIVE)
        with grpc.insecure_channel(place) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            assert stub.ModelInfer(request("m")).model_version == "1"
            assert device._supervisor is not None
            device._supervisor._worker.kill()
            codes = []

            def answered() -> bool:
                try:
                    stub.ModelInfer(request("m"), wait_for_ready=True, timeout=30)
                except grpc.RpcError as error:
                    codes.append(error.code())
                    return False
                return True

            wait_until("an answer of the next worker", answered, 60)
            assert set(codes) <= {grpc.StatusCode.UNAVAILABLE}


def test_a_device_tells_that_it_can_not_serve_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        place = f"127.0.0.1:{other.getsockname()[1]}"
        with RealDevice(tmp_path / "state", monkeypatch, grpc=GrpcConfig(serve=True, listen=place)) as device:

            def told() -> str:
                assert device.link is not None
                found = [one.detail for one in device.link.reports[-1].problems if one.code == GRPC_NOT_SERVED]
                return found[0] if found else ""

            assert f"{place} can't be had" in wait_until("the problem", told)


def loaded_libraries(worker: ServingWorker) -> str:
    return Path(f"/proc/{worker.process.pid}/maps").read_text()


def test_it_costs_nothing_where_it_is_off() -> None:
    with running() as on:
        assert "cygrpc" in loaded_libraries(on)
    off = start_worker()
    assert serves_http(off)
    assert "cygrpc" not in loaded_libraries(off)
    assert "google/_upb" not in loaded_libraries(off)
    off.channel.close()
    assert off.process.wait(20) == 0
