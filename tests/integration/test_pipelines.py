"""A pipeline's process with a real inference worker, broker, receivers and ffmpeg, killed in the middle."""

from __future__ import annotations

import base64
import collections
import contextlib
import hashlib
import hmac
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import paho.mqtt.client as paho
import psutil
import pytest
from onnx import TensorProto, helper
from paho.mqtt.enums import CallbackAPIVersion
from PIL import Image

from agent.pipelines.config import (
    FileSink,
    FolderSource,
    MqttSink,
    MqttSource,
    Only,
    PipelineConfig,
    VideoSource,
    WavSource,
    WebhookSink,
)
from agent.pipelines.ipc import Begin, Fine, FromPipeline, Trouble
from agent.protocol.manifest import Manifest, ModelFormat, Precision, RuntimeName, TensorSpec
from agent.serving.ensemble_config import EnsembleConfig, StepConfig
from agent.serving.framing import FrameChannel
from agent.serving.ipc import Declare, Unservable
from fleet_server.gateway.broker import find_mosquitto
from tests.fleet import free_port, wait_until
from tests.image_worker import COLOR, Worker, manifest

FFMPEG = shutil.which("ffmpeg")


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    (tmp_path / "worker").mkdir()
    worker = Worker(tmp_path / "worker")
    try:
        yield worker
    finally:
        worker.stop()


class Pipeline:
    """A process as the supervisor has it."""

    def __init__(self, folder: Path, config: PipelineConfig, listen: str, unix_socket: str = "") -> None:
        self.order = Begin(config, "cam", str(folder / "state"), listen, unix_socket, 20.0, "INFO")
        self.said: list[Any] = []
        self.start()

    def start(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "agent.pipelines.process", "--fd", str(theirs.fileno())]
        self.process = subprocess.Popen([*command, "--parent", str(os.getpid())], pass_fds=[theirs.fileno()])
        theirs.close()
        self.channel = FrameChannel(ours, FromPipeline)
        self.channel.send(self.order)
        self.thread = threading.Thread(target=self._read, args=(self.channel,))
        self.thread.start()

    def _read(self, channel: FrameChannel) -> None:
        while (message := channel.receive()) is not None:
            self.said.append(message)

    def troubles(self, code: str) -> list[str]:
        return [one.detail for one in list(self.said) if isinstance(one, Trouble) and one.code == code]

    def fine(self, code: str) -> bool:
        return any(isinstance(one, Fine) and one.code == code for one in list(self.said))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.thread.join(10)
        self.channel.close()

    def stop(self) -> int:
        self.channel.shut()
        status = self.process.wait(20)
        self.thread.join(10)
        self.channel.close()
        return status


@contextlib.contextmanager
def running(folder: Path, config: PipelineConfig, listen: str) -> Iterator[Pipeline]:
    pipeline = Pipeline(folder, config, listen)
    try:
        yield pipeline
    finally:
        if pipeline.process.poll() is None:
            assert pipeline.stop() == 0


def address(worker: Worker) -> str:
    return f"{worker.client.base_url.host}:{worker.client.base_url.port}"


def jpeg(color: tuple[int, int, int], side: int = 32) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), color).save(file, "JPEG")
    return file.getvalue()


RED, GREEN = jpeg((200, 10, 10)), jpeg((10, 200, 10))


def results(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a file, and of those that were rotated away."""
    found = []
    for one in sorted(path.parent.glob(f"{path.name}*"), reverse=True):
        found += [json.loads(line) for line in one.read_bytes().split(b"\n")[:-1]]
    return found


def outputs(event: dict[str, Any]) -> dict[str, Any]:
    return {one["name"]: one["data"] for one in event["data"]["outputs"]}


class Receiver:
    """An HTTP server that notes what it is sent, and answers what it is told to."""

    def __init__(self, port: int = 0) -> None:
        self.taken: list[tuple[dict[str, str], bytes]] = []
        self.status = 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if len(body) < int(self.headers["Content-Length"]):
                    return  # the sender was killed
                if outer.status == 200:
                    outer.taken.append(({key.lower(): value for key, value in self.headers.items()}, body))
                self.send_response(outer.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Broker:
    """Mosquitto, that can be taken away and comes back; with messages that it has to keep."""

    def __init__(self, folder: Path) -> None:
        self.port, self.folder = free_port(), folder
        (folder / "broker").mkdir()
        self.config = folder / "broker" / "mosquitto.conf"
        self.config.write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\npersistence true\nuser root\n"
            f"persistence_location {folder / 'broker'}/\n"
        )
        self.start()

    def start(self) -> None:
        executable, environment = find_mosquitto("mosquitto")
        self.process = subprocess.Popen(
            [str(executable), "-c", str(self.config)], env={**os.environ, **environment}, stderr=subprocess.DEVNULL
        )
        wait_until("the broker", self._answers)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            return True
        return False

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)

    @contextlib.contextmanager
    def client(self, topic: str = "") -> Iterator[tuple[paho.Client, list[bytes]]]:
        taken: list[bytes] = []
        client = paho.Client(CallbackAPIVersion.VERSION2, client_id="test", clean_session=False)
        client.on_message = lambda _client, _data, message: taken.append(message.payload)
        client.on_connect = lambda *_: client.subscribe(topic, qos=1) if topic else None
        client.reconnect_delay_set(1, 1)
        client.connect("127.0.0.1", self.port)
        client.loop_start()
        wait_until("a client", client.is_connected)
        try:
            yield client, taken
        finally:
            client.disconnect()
            client.loop_stop()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(tmp_path)
    yield broker
    broker.stop()


AT_ONCE: dict[str, Any] = {"retry_s": 0.05, "report_after_s": 0.2}
AWAY: dict[str, Any] = {"away_s": 1.0}  # of a broker


def colors(folder: Path, source: Any, *sinks: Any, **more: Any) -> PipelineConfig:
    sinks = sinks or (FileSink("file", str(folder / "out.jsonl")),)
    return PipelineConfig("door", "colors", source, sinks, **AT_ONCE, **more)


# -- folder


def test_files_are_answered_once_and_then_go(tmp_path: Path, worker: Worker) -> None:
    worker.load(manifest("colors", "1", COLOR))
    for name in ("in", "gone"):
        (tmp_path / name).mkdir()
    out = tmp_path / "out.jsonl"
    config = colors(tmp_path, FolderSource(str(tmp_path / "in"), "move", str(tmp_path / "gone")), only=Only(("red",)))
    (tmp_path / "in" / "b.jpg").write_bytes(RED)
    (tmp_path / "in" / "a.jpg").write_bytes(RED)
    (tmp_path / "in" / "c.jpg").write_bytes(GREEN)  # is answered, and not published
    (tmp_path / "in" / "note.txt").write_text("no image")
    (tmp_path / "in" / "broken.jpg").write_bytes(RED[:100])
    (tmp_path / "in" / "coming.jpg.part").write_bytes(RED)
    (tmp_path / "in" / "link.jpg").symlink_to("/etc/passwd")
    with running(tmp_path, config, address(worker)) as pipeline:
        wait_until("the files", lambda: len(list((tmp_path / "gone").iterdir())) == 3)
        wait_until("the results", lambda: out.exists() and len(results(out)) == 2)
        first, second = results(out)
        assert [one["data"]["item"]["file"] for one in (first, second)] == ["a.jpg", "b.jpg"]
        assert first["type"] == "shoal.inference"
        assert first["source"] == "shoal/device/cam/pipelines/door"
        assert outputs(first)["labels"][0] == "red"
        assert first["data"]["model"] == "colors"
        left = sorted(one.name for one in (tmp_path / "in").iterdir())
        assert left == ["broken.jpg", "coming.jpg.part", "link.jpg", "note.txt"]
        wait_until("the refusal", lambda: pipeline.troubles("pipeline_refused"))
        # A file that grows is taken when it is whole.
        with (tmp_path / "in" / "slow.jpg").open("wb") as file:
            for start in range(0, len(RED), len(RED) // 8):
                file.write(RED[start : start + len(RED) // 8])
                file.flush()
                time.sleep(0.2)
        wait_until("the slow file", lambda: len(results(out)) == 3)
        assert (tmp_path / "gone" / "slow.jpg").read_bytes() == RED
        (tmp_path / "in" / "a.jpg").write_bytes(RED)  # the same name again is another file
        wait_until("the new file", lambda: len(results(out)) == 4)
        assert (tmp_path / "gone" / "a-1.jpg").exists()
    ended = results(out)
    with running(tmp_path, config, address(worker)):
        time.sleep(1.5)
    assert results(out) == ended


@pytest.mark.parametrize("then", ["keep", "delete"])
def test_a_killed_pipeline_loses_no_file_and_answers_none_twice(tmp_path: Path, worker: Worker, then: str) -> None:
    worker.load(manifest("colors", "1", COLOR))
    (tmp_path / "in").mkdir()
    out, receiver = tmp_path / "out.jsonl", Receiver()
    names = {f"{number:03}.jpg" for number in range(120)}
    for name in names:
        (tmp_path / "in" / name).write_bytes(RED)
    hook = WebhookSink("hook", f"http://127.0.0.1:{receiver.port}/", batch=7)
    config = colors(tmp_path, FolderSource(str(tmp_path / "in"), then), FileSink("file", str(out)), hook)
    pipeline = Pipeline(tmp_path, config, address(worker))
    try:
        for kills in range(1, 6):
            wait_until("some results", lambda kills=kills: out.exists() and len(results(out)) >= kills * 12)
            pipeline.kill()
            pipeline.start()
        wait_until("all results", lambda: len(results(out)) >= len(names))
        wait_until("the webhook", lambda: len(posted(receiver)) >= len(names))
        time.sleep(1)
        assert pipeline.stop() == 0
    finally:
        if pipeline.process.poll() is None:
            pipeline.kill()
        receiver.close()
    files = [one["data"]["item"]["file"] for one in results(out)]
    assert collections.Counter(files) == dict.fromkeys(names, 1)
    assert files == sorted(files)
    # A webhook may be told twice, by the same id.
    assert posted(receiver) == {one["id"] for one in results(out)}
    assert len(list((tmp_path / "in").iterdir())) == (120 if then == "keep" else 0)


def posted(receiver: Receiver) -> set[str]:
    return {one["id"] for _, body in list(receiver.taken) for one in json.loads(body)}


def test_a_model_that_is_not_there_yet_is_waited_for(tmp_path: Path, worker: Worker) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(RED)
    out = tmp_path / "out.jsonl"
    with running(tmp_path, colors(tmp_path, FolderSource(str(tmp_path / "in"))), address(worker)) as pipeline:
        wait_until("the problem", lambda: "does not run here" in "".join(pipeline.troubles("pipeline_failed")))
        assert not out.exists()
        worker.load(manifest("colors", "1", COLOR))
        wait_until("the result", lambda: out.exists() and results(out))
        assert pipeline.fine("pipeline_failed")


def test_a_state_folder_that_can_not_be_written_ends_it_with_the_reason(tmp_path: Path, worker: Worker) -> None:
    (tmp_path / "state").write_text("a file in the place of the folder")
    pipeline = Pipeline(tmp_path, colors(tmp_path, FolderSource(str(tmp_path))), address(worker))
    assert pipeline.process.wait(30) == 1
    pipeline.stop()
    assert "can't be written" in pipeline.troubles("pipeline_failed")[0]


# -- sinks


def test_a_webhook_is_signed_and_what_it_missed_comes_in_order(tmp_path: Path, worker: Worker) -> None:
    worker.load(manifest("colors", "1", COLOR))
    (tmp_path / "in").mkdir()
    key = b"k" * 32
    (tmp_path / "secret").write_text(f"whsec_{base64.b64encode(key).decode()}\n")
    (tmp_path / "token").write_text("the-token\n")
    port, out = free_port(), tmp_path / "out.jsonl"
    files = {"token_file": str(tmp_path / "token"), "secret_file": str(tmp_path / "secret")}
    hook = WebhookSink("hook", f"http://127.0.0.1:{port}/x?y=1", **files)
    config = colors(tmp_path, FolderSource(str(tmp_path / "in")), hook, FileSink("file", str(out)))
    with running(tmp_path, config, address(worker)) as pipeline:
        for number in range(4):
            (tmp_path / "in" / f"{number}.jpg").write_bytes(RED)
        wait_until("the file, which needs no webhook", lambda: out.exists() and len(results(out)) == 4)
        wait_until("the problem", lambda: pipeline.troubles("pipeline_undelivered"))
        receiver = Receiver(port)
        try:
            wait_until("what waited", lambda: len(receiver.taken) == 4)
            wait_until("its end", lambda: pipeline.fine("pipeline_undelivered"))
        finally:
            receiver.close()
    assert [json.loads(body) for _, body in receiver.taken] == results(out)
    for headers, body in receiver.taken:
        assert headers["authorization"] == "Bearer the-token"
        assert headers["content-type"] == "application/cloudevents+json"
        assert headers["webhook-id"] == json.loads(body)["id"]
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        want = base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
        assert headers["webhook-signature"] == f"v1,{want}"


def test_an_event_that_a_receiver_can_not_use_does_not_hold_up_the_others(tmp_path: Path, worker: Worker) -> None:
    worker.load(manifest("colors", "1", COLOR))
    (tmp_path / "in").mkdir()
    receiver = Receiver()
    receiver.status = 422
    hook = WebhookSink("hook", f"http://127.0.0.1:{receiver.port}/", batch=10)
    with running(tmp_path, colors(tmp_path, FolderSource(str(tmp_path / "in")), hook), address(worker)) as pipeline:
        (tmp_path / "in" / "bad.jpg").write_bytes(RED)
        wait_until("the drop", lambda: "422" in "".join(pipeline.troubles("pipeline_dropped")), 60)
        receiver.status = 200
        (tmp_path / "in" / "good.jpg").write_bytes(RED)
        wait_until("the good one", lambda: receiver.taken)
        assert [one["data"]["item"]["file"] for one in json.loads(receiver.taken[0][1])] == ["good.jpg"]
    receiver.close()


def test_results_wait_for_a_broker_that_is_away(tmp_path: Path, worker: Worker, broker: Broker) -> None:
    worker.load(manifest("colors", "1", COLOR))
    (tmp_path / "in").mkdir()
    sink = MqttSink("mqtt", f"mqtt://127.0.0.1:{broker.port}", "plant7/door", **AWAY)
    config = colors(tmp_path, FolderSource(str(tmp_path / "in")), sink)
    with broker.client("plant7/door") as (_, taken), running(tmp_path, config, address(worker)) as pipeline:
        (tmp_path / "in" / "0.jpg").write_bytes(RED)
        wait_until("the first", lambda: taken)
        broker.stop()
        for number in range(1, 5):
            (tmp_path / "in" / f"{number}.jpg").write_bytes(RED)
        wait_until("the problem", lambda: pipeline.troubles("pipeline_undelivered"))
        pipeline.kill()  # what waits is on the disk
        broker.start()
        pipeline.start()
        wait_until("the others", lambda: len({json.loads(one)["id"] for one in taken}) == 5)
    order = list(dict.fromkeys(json.loads(one)["data"]["item"]["file"] for one in taken))
    assert order == [f"{number}.jpg" for number in range(5)]


# -- mqtt


def test_messages_are_answered_also_those_of_a_time_of_death(tmp_path: Path, worker: Worker, broker: Broker) -> None:
    worker.load(manifest("colors", "1", COLOR))
    out = tmp_path / "out.jsonl"
    config = colors(tmp_path, MqttSource(f"mqtt://127.0.0.1:{broker.port}", "cameras/+/jpeg", **AWAY))
    row = {"name": "image", "datatype": "FP32", "shape": [1, 3, 16, 16], "data": [0.5] * 768}
    with running(tmp_path, config, address(worker)) as pipeline, broker.client() as (client, _):
        wait_until("the session", lambda: client.publish("cameras/1/jpeg", RED, qos=1) and out.exists(), 30)
        count = len(results(out))
        client.publish("cameras/1/jpeg", b"rubbish", qos=1)
        client.publish("cameras/2/jpeg", json.dumps({"inputs": [row]}).encode(), qos=1)
        client.publish("cameras/2/other", RED, qos=1)
        wait_until("tensors", lambda: results(out)[-1]["data"]["item"]["topic"] == "cameras/2/jpeg")
        assert len(outputs(results(out)[-1])["scores"]) == 3
        wait_until("the refusal", lambda: "neither JPEG" in "".join(pipeline.troubles("pipeline_refused")))
        time.sleep(0.5)
        pipeline.kill()
        count = len(results(out))
        for _ in range(5):
            client.publish("cameras/3/jpeg", GREEN, qos=1).wait_for_publish(5)
        pipeline.start()
        wait_until("what came meanwhile", lambda: len(results(out)) >= count + 5)
        broker.stop()
        wait_until("the problem", lambda: "is away" in "".join(pipeline.troubles("pipeline_failed")), 60)
        broker.start()
        wait_until("the end of it", lambda: pipeline.fine("pipeline_failed"), 60)
        wait_until("a client", client.is_connected)
        client.publish("cameras/4/jpeg", GREEN, qos=1)
        wait_until("the last", lambda: results(out)[-1]["data"]["item"]["topic"] == "cameras/4/jpeg")
        time.sleep(0.5)
    assert len(results(out)) == count + 6


# -- video


def write_video(path: Path, seconds: int) -> None:
    """10 frames a second: red, then green from the middle on."""
    half = seconds / 2
    command = [str(FFMPEG), "-loglevel", "error", "-y"]
    for color in ("red", "green"):
        command += ["-f", "lavfi", "-i", f"color={color}:size=64x48:rate=10:duration={half}"]
    command += ["-filter_complex", "concat=n=2", "-c:v", "mpeg4", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def readers(video: Path) -> list[str]:
    """Processes that have it among their arguments."""
    running = [one.info for one in psutil.process_iter(["cmdline", "status"])]
    alive = [one["cmdline"] or [] for one in running if one["status"] != psutil.STATUS_ZOMBIE]
    return [" ".join(one) for one in alive if f"file:{video}" in one]


@pytest.mark.skipif(FFMPEG is None, reason="ffmpeg is not installed")
@pytest.mark.parametrize("every_s", [0.0, 0.5])
def test_a_video_is_answered_frame_by_frame_also_when_killed(tmp_path: Path, worker: Worker, every_s: float) -> None:
    worker.load(manifest("colors", "1", COLOR))
    out, video = tmp_path / "out.jsonl", tmp_path / "-i door.mp4"
    write_video(video, 6)
    count = 12 if every_s else 60
    config = colors(tmp_path, VideoSource(str(video)), every_s=every_s)
    with running(tmp_path, config, address(worker)) as pipeline:
        wait_until("some frames", lambda: out.exists() and len(results(out)) >= 3)
        pipeline.kill()
        wait_until("the end of its ffmpeg", lambda: not readers(video))
        pipeline.start()
        wait_until("all frames", lambda: len(results(out)) >= count)
        time.sleep(1)
        assert pipeline.troubles("pipeline_failed") == []
    found = results(out)
    assert [one["data"]["item"]["frame"] for one in found] == list(range(count))
    assert [outputs(one)["labels"][0] for one in found] == ["red"] * (count // 2) + ["green"] * (count // 2)
    if every_s:
        assert found[3]["data"]["item"]["position_s"] == 1.5


@pytest.mark.skipif(FFMPEG is None, reason="ffmpeg is not installed")
def test_of_a_live_stream_the_newest_frame_counts_and_it_is_opened_again(tmp_path: Path, worker: Worker) -> None:
    worker.load(manifest("colors", "1", COLOR))
    out, port = tmp_path / "out.jsonl", free_port()
    config = colors(tmp_path, VideoSource(f"http://someone:secret@127.0.0.1:{port}/live"), every_s=0.5)
    with running(tmp_path, config, address(worker)) as pipeline:
        wait_until("the problem", lambda: pipeline.troubles("pipeline_failed"))
        assert "secret" not in str(pipeline.said)
        camera = [str(FFMPEG), "-loglevel", "quiet", "-re", "-f", "lavfi", "-i", "color=red:size=64x48:rate=20"]
        camera += ["-c:v", "mjpeg", "-f", "mpjpeg", "-listen", "1", f"http://127.0.0.1:{port}/live"]
        with subprocess.Popen(camera, stdin=subprocess.DEVNULL) as stream:
            wait_until("frames", lambda: out.exists() and len(results(out)) >= 5)
            stream.kill()
    found = results(out)
    times = [one["time"] for one in found]
    assert times == sorted(times)
    assert found[0]["data"]["item"]["input"] == f"http://127.0.0.1:{port}/live"
    assert pipeline.fine("pipeline_failed")


def test_what_is_missing_for_a_video_is_said(tmp_path: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    worker.load(manifest("colors", "1", COLOR))
    monkeypatch.setenv("PATH", str(tmp_path))
    with running(tmp_path, colors(tmp_path, VideoSource("/dev/video99", camera=True)), address(worker)) as pipeline:
        wait_until("the problem", lambda: "ffmpeg is not installed" in "".join(pipeline.troubles("pipeline_failed")))


@pytest.mark.skipif(FFMPEG is None, reason="ffmpeg is not installed")
def test_a_file_that_is_no_video_is_said_with_what_ffmpeg_says(tmp_path: Path, worker: Worker) -> None:
    worker.load(manifest("colors", "1", COLOR))
    (tmp_path / "x.mp4").write_bytes(b"no video")
    with running(tmp_path, colors(tmp_path, VideoSource(str(tmp_path / "x.mp4"))), address(worker)) as pipeline:
        wait_until("the problem", lambda: "Invalid data" in "".join(pipeline.troubles("pipeline_failed")))


# -- sound


def write_level_net(path: Path) -> None:
    """A recurrent net: the sum of a window's samples is added to a state, and multiplied by a constant."""
    nodes = [
        helper.make_node("ReduceSum", ["input", "axes"], ["sum"], keepdims=1),
        helper.make_node("Add", ["sum", "state"], ["stateN"]),
        helper.make_node("Mul", ["stateN", "factor"], ["level"]),
    ]
    graph = helper.make_graph(
        nodes,
        "level",
        [
            helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 4]),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [1, 1]),
            helper.make_tensor_value_info("factor", TensorProto.FLOAT, []),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1]) for name in ("level", "stateN")],
        [helper.make_tensor("axes", TensorProto.INT64, [1], [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, str(path))


def level_manifest() -> Manifest:
    inputs = (("input", (1, 4)), ("state", (1, 1)), ("factor", ()))
    return Manifest(
        "1" + "d" * 63, 10, 4, "level", "1", "v", "p", ModelFormat.ONNX, RuntimeName.ONNX, Precision.FP32,
        tuple(TensorSpec(name, "float32", shape) for name, shape in inputs),
        tuple(TensorSpec(name, "float32", (1, 1)) for name in ("level", "stateN")), max_batch=1,
    )  # fmt: skip


def wav_bytes(samples: np.ndarray, rate: int = 8000) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as target:
        target.setnchannels(1)
        target.setsampwidth(2)
        target.setframerate(rate)
        target.writeframes(samples.astype("<i2").tobytes())
    return file.getvalue()


def sound(path: Path, **more: Any) -> WavSource:
    return WavSource(str(path), "input", 4, 4, 8000, {"state": "stateN"}, {"factor": 2.0}, **more)


@pytest.mark.parametrize(
    ("fifo", "model"), [(False, "level"), (True, "level"), (False, "heard")], ids=["file", "fifo", "ensemble"]
)
def test_windows_of_sound_with_a_state_that_is_carried_on(
    tmp_path: Path, worker: Worker, fifo: bool, model: str
) -> None:
    write_level_net(worker.folder / "level")
    worker.load(level_manifest())
    inputs, gives = ("input", "state", "factor"), ("level", "stateN")
    step = StepConfig("level", "level", {one: one for one in inputs}, {one: one for one in gives})
    worker.channel.send(Declare((EnsembleConfig("heard", inputs, gives, (step,)),)))
    assert worker.channel.receive() == Unservable({})
    samples = np.random.default_rng(0).integers(-20_000, 20_000, 403)
    path, out = tmp_path / "mic", tmp_path / "out.jsonl"
    config = PipelineConfig("ear", model, sound(path), (FileSink("file", str(out)),), **AT_ONCE)
    if fifo:
        os.mkfifo(path)
    else:
        path.write_bytes(wav_bytes(samples))
    with running(tmp_path, config, address(worker)) as pipeline:
        if fifo:
            with path.open("wb") as stream:
                stream.write(wav_bytes(samples))
        wait_until("all windows", lambda: out.exists() and len(results(out)) >= 100)
        assert pipeline.troubles("pipeline_failed") == []
    sums = (samples[:400] / 32768).reshape(-1, 4).sum(axis=1)
    found = results(out)
    assert [one["data"]["item"]["sample"] for one in found] == list(range(0, 400, 4))
    assert [list(outputs(one)) for one in found] == [["level"]] * 100  # a state is nobody's result
    np.testing.assert_allclose([outputs(one)["level"][0] for one in found], 2 * np.cumsum(sums), rtol=1e-4, atol=1e-4)


def test_sound_that_does_not_fit_is_said_with_the_remedy(tmp_path: Path, worker: Worker) -> None:
    write_level_net(worker.folder / "level")
    worker.load(level_manifest())
    path = tmp_path / "mic.wav"
    sinks = (FileSink("file", str(tmp_path / "out.jsonl")),)
    for content, source, said in (
        (wav_bytes(np.zeros(9), 44_100), sound(path), "set `rate`"),
        (b"rubbish", sound(path), "no WAV stream"),
        (wav_bytes(np.zeros(9)), WavSource(str(path), "input", 5, 5, 8000), "change `window`"),
        (wav_bytes(np.zeros(9)), WavSource(str(path), "sound", 4, 4, 8000), "no input 'sound'"),
    ):
        path.write_bytes(content)
        with running(tmp_path, PipelineConfig("ear", "level", source, sinks, **AT_ONCE), address(worker)) as pipeline:
            wait_until(said, lambda said=said: said in "".join(pipeline.troubles("pipeline_failed")))
