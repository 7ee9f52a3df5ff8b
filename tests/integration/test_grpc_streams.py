"""Streams of requests by `tritonclient.grpc`, unchanged, and by hostile clients, against a real worker."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import grpc
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2, service_pb2_grpc

from agent.protocol.manifest import Scheduling
from agent.serving.exchange import BODY_LIMIT
from tests.fleet import wait_until
from tests.integration.test_grpc import ARMED, ROW, SPECS, at, request, running, statistics, tensor
from tests.serving_worker import ServingWorker, described, serve, start_worker, write_echo
from tests.traps import write_trapped


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServingWorker]:
    """One with an echo, and a model that is slow with rows that spring its trap."""
    folder = tmp_path_factory.mktemp("models")
    with running() as found:
        serve(found.channel, write_echo(folder / "echo", "float32"), folder / "echo")
        write_trapped(folder / "slow", "slow", rounds=20_000)
        slow = described("slow", *SPECS, max_batch=1, scheduling=Scheduling(queue_limit=64))
        serve(found.channel, slow, folder / "slow")
        yield found


@pytest.fixture
def stub(worker: ServingWorker) -> Iterator[Any]:
    with grpc.insecure_channel(at(worker), options=[("grpc.max_send_message_length", -1)]) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


class Stream:
    """One of tritonclient's, and what came by it."""

    def __init__(self, worker: ServingWorker, **options: Any) -> None:
        self.client = triton.InferenceServerClient(at(worker))
        self.came: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self.client.start_stream(lambda result, error: self.came.put((result, error)), **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def ask(self, model: str, value: Any, **more: Any) -> None:
        self.client.async_stream_infer(model, [tensor("x", value, "FP32")], **more)

    def next(self) -> tuple[Any, Any]:
        return self.came.get(timeout=30)


def test_answers_come_in_the_order_of_requests_and_an_error_ends_nothing(worker: ServingWorker) -> None:
    """The first is slow, and those behind it are of another model, which has answered long before."""
    with Stream(worker) as stream:
        stream.ask("slow", ARMED, request_id="0")
        for number in range(1, 60):
            wrong = number % 7 == 0
            stream.ask("nobody" if wrong else "echo-float32", ROW[:, :3] + number, request_id=str(number))
        for number in range(60):
            result, error = stream.next()
            if number and number % 7 == 0:
                assert "does not run here" in str(error)
                continue
            assert error is None
            assert result.get_response().id == str(number)
            assert result.get_response().parameters["triton_final_response"].bool_param
            if number:
                assert result.as_numpy("y").tolist() == (ROW[:, :3] + number).tolist()
        stream.client.stop_stream()
        assert stream.came.empty()


def test_what_is_wrong_with_one_is_said_in_its_answer(worker: ServingWorker, stub: Any) -> None:
    """With its id, where it could be read; bytes that are no message are one request too."""
    asked = [request("echo-float32", shape=[1, 7], datatype="FP32"), request("echo-float32"), request("nobody")]
    for one, number in zip(asked, "abc", strict=True):
        one.id = number
    said = list(stub.ModelStreamInfer(iter(asked)))
    assert "input 'x'" in said[0].error_message
    assert [one.error_message == "" for one in said] == [False, True, False]
    assert [one.infer_response.id for one in said] == ["a", "b", "c"]
    with grpc.insecure_channel(at(worker)) as channel:
        raw = channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )
        said = list(raw(iter([b"\xff\xff\xff", b"", request("echo-float32").SerializeToString()])))
        assert "no protocol buffer" in said[0].error_message
        assert "model_name" in said[1].error_message
        assert said[2].infer_response.model_name == "echo-float32"
        assert list(raw(iter(()))) == []


def test_a_message_that_is_too_large_ends_its_stream(stub: Any) -> None:
    said = stub.ModelStreamInfer(iter([request("echo-float32"), request(raw=bytes(BODY_LIMIT))]))
    with pytest.raises(grpc.RpcError) as error:
        list(said)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert stub.ServerLive(service_pb2.ServerLiveRequest()).live


def test_a_stream_that_is_cancelled_leaves_the_worker_as_it_was(worker: ServingWorker, stub: Any) -> None:
    before = statistics(stub, "slow").success.count
    with Stream(worker) as stream:
        for _ in range(8):
            stream.ask("slow", ARMED)
        stream.next()
        stream.client.stop_stream(cancel_requests=True)
        last = list(stream.came.queue)[-1]
        assert "Locally cancelled" in str(last[1])
    wait_until("what was begun", lambda: statistics(stub, "slow").success.count == before + 8)
    with Stream(worker) as stream:
        stream.ask("echo-float32", ROW[:, :3])
        assert stream.next()[1] is None


def test_the_deadline_of_a_stream(worker: ServingWorker) -> None:
    with Stream(worker, stream_timeout=0.5) as stream:
        stream.ask("echo-float32", ROW[:, :3])
        assert stream.next()[1] is None
        assert stream.next()[1].status() == "StatusCode.DEADLINE_EXCEEDED"


def test_a_worker_that_ends_says_so_when_what_came_is_answered(tmp_path: Path) -> None:
    with running() as worker, Stream(worker) as stream:
        serve(worker.channel, write_echo(tmp_path / "echo", "float32"), tmp_path / "echo")
        stream.ask("echo-float32", ROW[:, :3])
        assert stream.next()[1] is None
        worker.channel.close()
        assert "the worker ends" in str(stream.next()[1])


def test_a_worker_that_is_killed(tmp_path: Path) -> None:
    worker = start_worker(grpc=("127.0.0.1:0",))
    with contextlib.closing(worker.channel), Stream(worker) as stream:
        write_trapped(tmp_path / "slow", "slow", rounds=500_000)
        serve(worker.channel, described("slow", *SPECS), tmp_path / "slow")
        stream.ask("slow", ARMED)
        worker.process.kill()
        worker.process.wait(20)
        assert stream.next()[1].status() == "StatusCode.UNAVAILABLE"
