"""`predict` in pieces: by a function that answers as a server does, after checks of what is sent."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from agent.client.encoding import Answer, answer_of
from fleet_server.sdk import NetError, ShoalError
from fleet_server.sdk.predicting import predict
from fleet_server.sdk.tensors import in_pieces

X = [{"name": "x", "dtype": "float32", "shape": [-1, 3]}]


class Fleet:
    """Answers each request with its rows doubled; the earlier of two on their way is answered last."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.most = 0
        self._now = 0
        self._lock = threading.Lock()

    def __call__(self, content: bytes, length: int) -> tuple[bytes, int]:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
            self.sizes.append(len(content) - length)
            number = len(self.sizes)
        time.sleep(0.05 if number % 2 else 0.01)
        rows = asked(content, length)["x"]
        with self._lock:
            self._now -= 1
        return answer({"y": rows * 2})


def asked(content: bytes, length: int) -> Answer:
    """The tensors of a request: its JSON is an answer's but for the name of the list."""
    head = json.loads(content[:length])
    head = json.dumps({"outputs": head["inputs"]}).encode()
    return answer_of(head + content[length:], str(len(head)))


def answer(outputs: dict[str, Any]) -> tuple[bytes, int]:
    told, tail = [], b""
    for name, value in outputs.items():
        array = np.ascontiguousarray(value, np.float32)
        size = {"binary_data_size": array.nbytes}
        told.append({"name": name, "datatype": "FP32", "shape": array.shape, "parameters": size})
        tail += array.tobytes()
    devices = [{"device": "camera-01", "rows": len(next(iter(outputs.values()), ())), "left_out": ""}]
    said = {"model_name": "m", "outputs": told, "parameters": {"devices": devices}}
    head = json.dumps(said).encode()
    return head + tail, len(head)


def test_pieces_come_back_in_their_order_two_at_once() -> None:
    fleet, rows = Fleet(), np.arange(60, dtype=np.float32).reshape(20, 3)
    found = [one.outputs["y"] for one in in_pieces(fleet, {"x": rows}, piece_bytes=3 * 12)]
    assert (np.concatenate(found) == rows * 2).all()
    assert sorted(fleet.sizes) == [24, *[36] * 6]
    assert fleet.most == 2


def test_a_row_larger_than_a_piece_goes_alone() -> None:
    fleet = Fleet()
    assert len(list(in_pieces(fleet, {"x": np.ones((2, 3), np.float32)}, piece_bytes=5))) == 2
    assert fleet.sizes == [12, 12]


def test_tensors_come_back_as_tensors_and_wider_numbers_are_narrowed() -> None:
    found, answered = predict(torch.ones(2, 3, dtype=torch.float64), X, Fleet())
    assert answered == [{"device": "camera-01", "rows": 2}]
    assert isinstance(found, torch.Tensor)
    assert found.dtype == torch.float32
    assert found.tolist() == [[2.0] * 3] * 2


def test_several_outputs_come_by_name() -> None:
    found, _ = predict({"x": np.ones((2, 3))}, X, lambda *_: answer({"a": np.ones((2, 1)), "b": np.zeros((2, 4))}))
    assert {name: value.shape for name, value in found.items()} == {"a": (2, 1), "b": (2, 4)}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (np.ones((2, 4)), r"input 'x' has shape \[2, 4\], but the model takes \[rows, 3\]"),
        (np.ones(3), r"give one row as x\[None\]"),
        (np.ones((2, 3), np.complex64), "holds complex64, but the model takes float32"),
        (np.array([["a", "b", "c"]]), "convert it first"),
        (np.ones((0, 3)), "there are no rows"),
        ({"z": np.ones((2, 3))}, r"takes the inputs \['x'\], not \['z'\]"),
    ],
)
def test_rows_that_do_not_fit_are_named_before_anything_is_sent(given: Any, said: str) -> None:
    fleet = Fleet()
    with pytest.raises(NetError, match=said):
        predict(given, X, fleet)
    assert not fleet.sizes


def test_several_inputs_are_given_by_name() -> None:
    inputs = [*X, {"name": "z", "dtype": "int64", "shape": [-1]}]
    with pytest.raises(NetError, match="give a dict of rows by name"):
        predict(np.ones((2, 3)), inputs, Fleet())
    with pytest.raises(NetError, match="same number of rows"):
        predict({"x": np.ones((2, 3)), "z": np.ones(3, np.int64)}, inputs, Fleet())


@pytest.mark.parametrize(
    ("garbage", "said"),
    [
        ((b"{", 1), "can't be read"),
        (answer({}), "outputs: there is none"),
        (answer({"y": np.ones((1, 3))}), "can't be read: .*rows"),
    ],
)
def test_an_answer_that_makes_no_sense_is_said(garbage: tuple[bytes, str], said: str) -> None:
    with pytest.raises(ShoalError, match=said):
        predict(np.ones((2, 3)), X, lambda *_: garbage)


def test_a_piece_that_fails_ends_it_and_no_more_are_sent() -> None:
    sent = []

    def send(content: bytes, length: int) -> tuple[bytes, int]:
        sent.append(length)
        raise ShoalError("no device serves it")

    with pytest.raises(ShoalError, match="no device serves it"):
        list(in_pieces(send, {"x": np.ones((50, 3))}, piece_bytes=24))
    assert len(sent) <= 2
