"""What a device answered of a part, sent on to the next devices of its route by their real inference API."""

from __future__ import annotations

import queue
from pathlib import Path

import msgspec
import numpy as np
import pytest

from agent.errors import ConfigError
from agent.forwarding import Forwarder, is_of_lan, next_request
from agent.inferences import read_inference
from agent.protocol.parts import Hop, InferPart, PartAnswer
from tests.serving_worker import running_worker, serve, write_echo


@pytest.mark.parametrize(
    ("address", "of_lan"),
    [
        ("192.168.1.7:8470", True), ("10.0.0.1:1", True), ("127.0.0.1:80", True), ("[fe80::1]:80", True),
        ("[fd00::1]:80", True), ("8.8.8.8:80", False), ("example.org:80", False), ("192.168.1.7", False),
        ("192.168.1.7:0", False), ("192.168.1.7:99999", False), ("0.0.0.0:80", False), ("", False),
    ],
)  # fmt: skip
def test_only_addresses_of_the_lan_are_connected_to(address: str, of_lan: bool) -> None:
    assert is_of_lan(address) is of_lan


def answer_of(rows: np.ndarray, route: tuple[Hop, ...]) -> PartAnswer:
    """As a first stage gives it."""
    output = {"name": "x", "datatype": "FP32", "shape": rows.shape, "parameters": {"binary_data_size": rows.nbytes}}
    header = msgspec.json.encode({"model_name": "first", "outputs": [output]})
    return PartAnswer("p", 0, 200, len(header), header + rows.tobytes(), infer_s=0.5, route=route)


def part_of(route: tuple[Hop, ...]) -> InferPart:
    return InferPart("p", 0, "first", b"{}", 2, deadline_ms=20_000, route=route)


def passed(route: tuple[Hop, ...], rows: np.ndarray) -> PartAnswer | None:
    """What is said to the server of it; None where it was not taken."""
    said: queue.SimpleQueue[PartAnswer] = queue.SimpleQueue()
    forwarder = Forwarder(said.put)
    try:
        return said.get(timeout=20) if forwarder.take(part_of(route), answer_of(rows, route)) else None
    finally:
        forwarder.stop()


def test_the_next_device_answers_and_the_last_answer_is_told(tmp_path: Path) -> None:
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    manifest = write_echo(tmp_path / "echo.onnx", "float32", 4)
    with running_worker() as (channel, address, _):
        serve(channel, manifest, tmp_path / "echo.onnx")
        hop = Hop("next", "echo-float32", "1", address)
        told = passed((hop,), rows)
        assert told is not None
        assert (told.status, told.route, len(told.hops), told.hops[0]) == (200, (), 2, 0.5)
        assert told.body[told.header_length :] == rows.tobytes()
        assert msgspec.json.decode(told.body[: told.header_length])["outputs"][0]["name"] == "y"

        # What the second gives is called `y`, and a third that takes `x` refuses: the server goes on from there.
        told = passed((hop, hop), rows)
        assert told is not None
        assert (told.route, told.body[told.header_length :]) == ((hop,), rows.tobytes())


def test_what_is_not_reached_goes_by_the_server() -> None:
    rows = np.zeros((1, 4), np.float32)
    away = Hop("next", "echo-float32", "1", "127.0.0.1:1")
    told = passed((away,), rows)
    assert told is not None
    assert told.route == (away,)
    assert told.body == answer_of(rows, ()).body
    assert passed((Hop("next", "echo-float32", "1", None),), rows) is None
    assert passed((Hop("next", "echo-float32", "1", "8.8.8.8:80"),), rows) is None


@pytest.mark.parametrize("header", [b"[]", b"{}", b'{"outputs": 1}', b"no json"])
def test_what_is_no_answer_is_not_passed_on(header: bytes) -> None:
    with pytest.raises(ValueError):
        next_request(header, len(header))


@pytest.mark.parametrize("address", ["8.8.8.8:80", "192.168.1.7", "edge.local:8470", 7])
def test_an_owner_names_an_address_of_the_lan(address: object) -> None:
    with pytest.raises(ConfigError, match=r"inference\.address"):
        read_inference({"address": address})
    assert read_inference({"address": "192.168.1.7:8470"}).address == "192.168.1.7:8470"
