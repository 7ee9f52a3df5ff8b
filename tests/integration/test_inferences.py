"""Devices answer a request together: real server, broker and agents."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from agent.hardware import measure
from agent.protocol.codec import decode, encode
from agent.protocol.messages import Presence, Reported, ServingReport
from agent.protocol.parts import FEATURE, InferPart, PartAnswer
from agent.protocol.topics import DeviceTopic, device_topic
from agent.protocol.version import SPOKEN
from tests.fleet import BIN, LocalFleet, wait_until, write_classifier

HEADER_LENGTH = "Inference-Header-Content-Length"
ROWS = np.random.default_rng(3).normal(size=(64, 8)).astype(np.float32)
DEVICES = ("one", "two")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """Three devices that serve the model; the owner of the third does not let the server ask it."""
    folder = tmp_path_factory.mktemp("inferences")
    fleet = LocalFleet(folder)
    try:
        fleet.start_server()
        for name in DEVICES:
            fleet.start_agent(name, site="plant7")
        fleet.start_agent("shy", tables="[inference]\nremote = false\n")
        fleet.post("/profiles", {"name": "any", "runtime": "onnx", "precisions": ["fp32"]})
        write_classifier(folder / "model.onnx")
        fleet.push("net", "1", folder / "model.onnx")
        fleet.build("net@1", "any")
        wait_until("devices", lambda: len(fleet.get("/devices")["items"]) == 3)
        fleet.rollout("net@1")
        wait_until("all serve", lambda: len(fleet.get("/devices", query="model==net")["items"]) == 3)
        yield fleet
    finally:
        fleet.stop()


def binary(rows: np.ndarray, name: str = "x") -> tuple[bytes, dict[str, str]]:
    content = rows.tobytes()
    told = {"name": name, "datatype": "FP32", "shape": rows.shape, "parameters": {"binary_data_size": len(content)}}
    header = msgspec.json.encode({"inputs": [told]})
    return header + content, {HEADER_LENGTH: str(len(header)), "Content-Type": "application/octet-stream"}


def ask(fleet: LocalFleet, rows: np.ndarray, name: str = "x", **query: Any) -> httpx.Response:
    body, headers = binary(rows, name)
    return fleet.api.post("/models/net/infer", content=body, headers=headers, params=query)


def read(answer: httpx.Response) -> tuple[dict[str, Any], bytes]:
    assert answer.status_code == 200, answer.text
    length = int(answer.headers[HEADER_LENGTH])
    return msgspec.json.decode(answer.content[:length]), answer.content[length:]


def test_devices_share_the_rows_and_answer_as_one_bit_for_bit(fleet: LocalFleet) -> None:
    rows = np.tile(ROWS, (400, 1))  # of 800 KiB: several parts
    alone, expected = read(ask(fleet, rows, target="id==one"))
    assert [one["device"] for one in alone["parameters"]["devices"]] == ["one"]
    told, together = read(ask(fleet, rows))
    assert together == expected
    assert {one["device"] for one in told["parameters"]["devices"]} == set(DEVICES)
    assert sum(one["rows"] for one in told["parameters"]["devices"]) == len(rows)
    assert told["model_version"] == "1"
    as_text = fleet.infer("one", "net", ROWS)["outputs"][0]["data"]
    number = told["outputs"][0]
    values = np.frombuffer(together, np.float32).reshape(number["shape"])[: len(ROWS)]
    np.testing.assert_allclose(values.ravel(), as_text, rtol=1e-5, atol=1e-6)


def test_text_is_answered_as_text(fleet: LocalFleet) -> None:
    body = {"id": "7", "inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 8], "data": ROWS[:2].tolist()}]}
    told = fleet.api.post("/models/net/infer", json=body).json()
    assert told["id"] == "7"
    assert told["outputs"][0]["shape"][0] == 2
    np.testing.assert_allclose(
        told["outputs"][0]["data"], fleet.infer("one", "net", ROWS[:2])["outputs"][0]["data"], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("rows", "name", "query", "status", "code"),
    [
        (ROWS, "x", {"target": "id==nobody"}, 409, "no_device_serves"),
        (ROWS, "x", {"target": "id==shy"}, 409, "no_device_serves"),
        (ROWS, "x", {"version": "9"}, 409, "no_device_serves"),
        (ROWS, "x", {"target": "id=="}, 422, "bad_query"),
        (ROWS[:, :5], "x", {}, 422, "wrong_input"),
        (ROWS, "y", {}, 422, "wrong_input"),
        (ROWS[:0], "x", {}, 422, "wrong_input"),
        (np.zeros((1, 1 << 20), np.float32), "x", {}, 413, "row_too_large"),
    ],
)
def test_what_can_not_be_answered_is_said(
    fleet: LocalFleet, rows: np.ndarray, name: str, query: dict[str, str], status: int, code: str
) -> None:
    answer = ask(fleet, rows, name, **query)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text


def test_a_model_that_is_not_there_is_not_found(fleet: LocalFleet) -> None:
    assert fleet.api.post("/models/none/infer", json={"inputs": []}).json()["code"] == "model_not_found"


def test_a_device_that_is_killed_meanwhile_loses_no_row(fleet: LocalFleet) -> None:
    rows = np.tile(ROWS, (3000, 1))
    _, expected = read(ask(fleet, rows, target="id==one"))
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(ask(fleet, rows)))
    asking.start()
    time.sleep(0.05)
    fleet.kill("two")
    asking.join(60)
    try:
        _, together = read(answers[0])
        assert together == expected
    finally:
        fleet.start_agent("two")


class Stranger:
    """A device that speaks the protocol and answers as it is told to."""

    def __init__(self, fleet: LocalFleet, name: str, reply: Callable[[InferPart], list[PartAnswer]]) -> None:
        self.parts = 0
        self._name, self._reply = name, reply
        self._client = paho.Client(CallbackAPIVersion.VERSION2, client_id=f"shoal-{name}")
        self._client.on_connect = self._connected
        self._client.on_message = self._came
        self._client.connect("127.0.0.1", fleet.broker_port)
        self._client.loop_start()

    def _connected(self, client: paho.Client, *_: Any) -> None:
        client.subscribe(device_topic(self._name, DeviceTopic.INFER), 1)
        known = measure(Path.cwd(), tags={})
        known = msgspec.structs.replace(known, features=(FEATURE,))
        serving = ServingReport("net", "1", "0" * 64, "none", "onnxruntime 1", "cpu", 0.0)
        said = Reported(SPOKEN, "b", 1, 0, known, serving=(serving,), sent_at=time.time())
        client.publish(device_topic(self._name, DeviceTopic.PRESENCE), encode(Presence(online=True, boot_id="b")), 1)
        client.publish(device_topic(self._name, DeviceTopic.REPORTED), encode(said), 1)

    def _came(self, client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        self.parts += 1
        for answer in self._reply(decode(message.payload, InferPart)):
            client.publish(device_topic(self._name, DeviceTopic.INFERRED), encode(answer), 1)

    def close(self) -> None:
        gone = encode(Presence(online=False, boot_id="b"))
        self._client.publish(device_topic(self._name, DeviceTopic.PRESENCE), gone, 1).wait_for_publish(5)
        self._client.disconnect()
        self._client.loop_stop()


def answer_of(part: InferPart, rows: int, datatype: str = "FP32") -> PartAnswer:
    content = bytes(rows * 3 * 4)
    told = {"name": "y", "datatype": datatype, "shape": [rows, 3], "parameters": {"binary_data_size": len(content)}}
    header = msgspec.json.encode({"outputs": [told]})
    return PartAnswer(part.part_id, part.attempt, 200, len(header), header + content)


def rows_in(part: InferPart) -> int:
    found: int = msgspec.json.decode(part.body[: part.header_length])["inputs"][0]["shape"][0]
    return found


REPLIES: dict[str, tuple[Callable[[InferPart], list[PartAnswer]], str]] = {
    "no-answer": (lambda part: [PartAnswer(part.part_id, part.attempt, 200, 3, b"abc")], "what is no answer"),
    "rows": (lambda part: [answer_of(part, rows_in(part) + 1)], "rows for"),
    "datatype": (lambda part: [answer_of(part, rows_in(part), "FP31")], "no datatype"),
    "fails": (lambda part: [PartAnswer(part.part_id, part.attempt, 500, error="broken")], "500 broken"),
    "others": (lambda part: [PartAnswer("f" * 32, part.attempt, 200)], ""),
    "silent": (lambda _part: [], ""),
    "refuses": (lambda part: [PartAnswer(part.part_id, part.attempt, 429, retry_after_s=30.0)], ""),
}


@pytest.mark.parametrize("kind", sorted(REPLIES))
def test_a_device_that_answers_badly_or_not_at_all_spoils_nothing(fleet: LocalFleet, kind: str) -> None:
    reply, said = REPLIES[kind]
    stranger = Stranger(fleet, f"bad-{kind}", reply)
    try:
        wait_until("it", lambda: fleet.get("/devices", query=f"id==bad-{kind};model==net;online==true")["items"])
        rows = np.tile(ROWS, (3000, 1))  # more than the other one has done before it is asked
        _, expected = read(ask(fleet, rows, target="id==one"))
        told, together = read(ask(fleet, rows, target=f"id=in=(one,bad-{kind})", timeout_s=20))
        assert stranger.parts
        assert together == expected
        bad = next(one for one in told["parameters"]["devices"] if one["device"] == f"bad-{kind}")
        assert bad["rows"] == 0
        assert said in bad["left_out"]
        if said:
            alone = ask(fleet, ROWS, target=f"id==bad-{kind}")
            assert (alone.status_code, alone.json()["code"]) == (503, "device_failed")
            assert said in alone.json()["detail"]
        elif kind == "silent":
            alone = ask(fleet, ROWS, target=f"id==bad-{kind}", timeout_s=0.5)
            assert (alone.status_code, alone.json()["code"]) == (503, "deadline")
    finally:
        stranger.close()


def test_the_command_line_writes_what_devices_answer(fleet: LocalFleet, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=ROWS)
    environment = {**os.environ, "SHOAL_URL": fleet.url, "SHOAL_TOKEN": fleet.token}

    def shoal(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / "shoal"), "infer", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)

    done = shoal("net", "--input", "x.npz", "--target", "id==one", "--results", "y.npz", "-o", "json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["rows"], told["version"]) == (64, "1")
    assert told["devices"] == [{"device": "one", "rows": 64, "left_out": ""}]
    with np.load(tmp_path / "y.npz") as outputs:
        (name,) = outputs.files
        _, expected = read(ask(fleet, ROWS, target="id==one"))
        assert outputs[name].tobytes() == expected
    wrong = shoal("net", "--input", "none.npz")
    assert (wrong.returncode, "--input" in wrong.stderr) == (2, True)
    nobody = shoal("net", "--input", "x.npz", "--target", "id==nobody")
    assert (nobody.returncode, "serves net" in nobody.stderr) == (5, True)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["x.npz", "y.npz"]
