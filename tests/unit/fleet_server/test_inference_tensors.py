"""Requests cut by rows and answers joined again: what came in comes out, bit for bit; what is none is refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_server.domain.tensors import (
    Tensor,
    TensorError,
    binary_body,
    bytes_of_texts,
    read_answer,
    read_request,
    texts_of,
    write_answer,
)
from fleet_server.errors import InvalidError
from fleet_server.sdk.tensors import gathered, in_pieces, request_of

TEXTS = st.lists(st.binary(max_size=6), min_size=1, max_size=12)


@given(texts=TEXTS, width=st.integers(0, 3), cuts=st.lists(st.integers(0, 12), max_size=4))
def test_rows_cut_anywhere_join_to_what_they_were(texts: list[bytes], width: int, cuts: list[int]) -> None:
    rows = len(texts)
    numbers = np.random.default_rng(rows).integers(0, 255, (rows, width, 2), dtype=np.uint8)
    words = Tensor("words", "BYTES", (rows, 1), memoryview(bytes_of_texts(texts)))
    body, length = binary_body(
        {}, "inputs", [words, Tensor("n", "UINT8", numbers.shape, memoryview(numbers.tobytes()))]
    )
    asked = read_request(body, length)
    edges = sorted({0, rows, *(one for one in cuts if one < rows)})
    parts = []
    for first, last in pairwise(edges):
        part = read_request(*asked.part(first, last))
        assert part.rows == last - first
        outputs, _ = read_answer(*binary_body({}, "outputs", part.inputs), last - first)
        parts.append(outputs)
    joined, size = write_answer(parts, {"model_name": "m"}, binary=True)
    assert size is not None
    (first_words, last_numbers), _ = read_answer(joined, size, rows)
    assert texts_of(first_words) == texts
    assert bytes(last_numbers.data) == numbers.tobytes()


def test_rows_that_there_are_not_are_the_last_one_again() -> None:
    numbers = np.arange(6, dtype=np.int16).reshape(3, 2)
    words = [b"a", b"", b"ccc"]
    tensors = [
        Tensor("n", "INT16", (3, 2), memoryview(numbers.tobytes())),
        Tensor("words", "BYTES", (3, 1), memoryview(bytes_of_texts(words))),
    ]
    asked = read_request(*binary_body({}, "inputs", tensors))
    filled = read_request(*asked.part(1, 3, 4))
    assert filled.rows == 4
    assert np.frombuffer(filled.inputs[0].data, np.int16).tolist() == [2, 3, 4, 5, 4, 5, 4, 5]
    assert texts_of(filled.inputs[1]) == [b"", b"ccc", b"ccc", b"ccc"]
    assert asked.part(0, 3, 2) == asked.part(0, 3), "there are enough"


@given(st.binary(max_size=300), st.one_of(st.none(), st.integers(0, 400)))
def test_any_bytes_are_refused_by_name(body: bytes, length: int | None) -> None:
    with pytest.raises(InvalidError):
        read_request(body, length)
    with pytest.raises(TensorError):
        read_answer(body, length or 0, 1)


def one(**fields: Any) -> dict[str, Any]:
    return {"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4]} | fields


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([one(datatype="FP31")], "inputs.x: 'FP31' is no datatype"),
        ([one(shape=[])], "inputs.x: its shape has 0 axes"),
        ([one(shape=[-1, 2])], "inputs.x: its shape is negative"),
        ([one(shape=[1 << 40, 2])], "inputs.x: its shape is negative or too large"),
        ([one(shape=[2, 3])], "inputs.x: 16 bytes; its shape and datatype say 24"),
        ([one(data=["a"] * 4)], "inputs.x: its data are no FP32 values"),
        ([one(data={"a": 1})], "inputs.x: its data are no FP32 values"),
        ([one(datatype="INT8", data=[1, 2, 3, 400])], "inputs.x: its data are no INT8 values"),
        ([one(), one()], "inputs.x: its name is too long, or comes twice"),
        ([one(parameters={"binary_data_size": 16})], "inputs.x: binary_data_size is 16"),
        ([one(), one(name="y", shape=[4, 1])], "inputs: their first axes are rows, and differ: x 2, y 4"),
        ([], "inputs: there is none"),
        ([one(shape=[0, 2], data=[])], "inputs: there are no rows"),
    ],
)
def test_a_request_that_is_none_names_the_field(inputs: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(InvalidError, match="^" + said.replace("[", r"\[")):
        read_request(msgspec.json.encode({"inputs": inputs}), None)


def test_text_becomes_what_it_says() -> None:
    asked = read_request(msgspec.json.encode({"inputs": [one(data=[[1, 2], [3, 4]])], "id": "7"}), None)
    assert bytes(asked.inputs[0].data) == np.arange(1, 5, dtype="<f4").tobytes()
    body, length = write_answer([[asked.inputs[0]]], {}, binary=False)
    assert length is None
    assert msgspec.json.decode(body)["outputs"][0]["data"] == [1, 2, 3, 4]


def test_many_rows_go_in_pieces_two_at_once_and_come_in_order() -> None:
    rows = np.arange(1000, dtype=np.float64).reshape(500, 2)
    words = np.array([f"w{one}" for one in range(500)])
    sizes = []

    def ask(body: bytes, length: int) -> tuple[bytes, int]:
        asked = read_request(body, length)
        sizes.append(asked.rows)
        return binary_body({"parameters": {"devices": [], "reissued": 1}}, "outputs", asked.inputs)

    pieces = list(in_pieces(ask, {"x": rows, "w": words}, piece_bytes=(rows.nbytes + words.nbytes) // 7))
    assert len(pieces) == len(sizes) == 8
    np.testing.assert_array_equal(np.concatenate([piece.outputs["x"] for piece in pieces]), rows)
    np.testing.assert_array_equal(np.concatenate([piece.outputs["w"] for piece in pieces]), words)
    with pytest.raises(ValueError, match="complex128"):
        request_of({"x": np.zeros(3, np.complex128)})
    with pytest.raises(ValueError, match="as many in each"):
        list(in_pieces(ask, {"x": rows, "w": words[:3]}))
    assert gathered(*ask(*request_of({"x": rows})), 500).reissued == 1
