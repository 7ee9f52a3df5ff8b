"""Devices answer a request together: real server, broker and agents."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from tests.fleet import LocalFleet, wait_until, write_classifier

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
