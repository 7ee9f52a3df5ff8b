"""Devices whose model takes a fixed number of rows share a request that has any number; devices are this test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from agent.protocol.codec import decode, encode
from agent.protocol.messages import ServingReport
from agent.protocol.parts import FEATURE, InferPart, PartAnswer
from agent.protocol.topics import DeviceTopic, device_topic, parse_device_topic
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.domain.tensors import Tensor, binary_body, read_request
from fleet_server.errors import TooLargeError
from fleet_server.inferences.dispatch import Dispatch
from fleet_server.inferences.service import Desk, Wanted
from fleet_server.models import Profile, Variant
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.sdk.tensors import gathered, request_of
from tests.fabricated import fabricate
from tests.integration.test_device_messages import HELLO
from tests.reporting import record_report

ROWS = 4
WANTED = Wanted("net", None, None, 30.0)


class Devices:
    """Answer with squares, if the number of rows is theirs."""

    def __init__(self) -> None:
        self.dispatch = Dispatch(self._publish, lambda _topic: None)
        self.asked: list[int] = []

    def _publish(self, topic: str, payload: bytes) -> bool:
        part, device = decode(payload, InferPart), parse_device_topic(topic).device_id
        asked = read_request(part.body, part.header_length)
        self.asked.append(asked.rows)
        row = np.frombuffer(asked.inputs[0].data, np.float32).reshape(asked.inputs[0].shape)
        if asked.rows != ROWS:
            answer = PartAnswer(part.part_id, part.attempt, 400, error=f"x: it takes {ROWS} rows")
        else:
            made = Tensor("y", "FP32", row.shape, memoryview((row * row).tobytes()))
            body, length = binary_body({"model_name": "net", "model_version": "1"}, "outputs", [made])
            answer = PartAnswer(part.part_id, part.attempt, 200, length, body)
        self.dispatch.hear(device_topic(device, DeviceTopic.INFERRED), encode(answer))
        return True


@pytest.fixture
def desk(database: Database, tmp_path: Path) -> tuple[Desk, Devices]:
    with database.write() as session:
        spec: dict[str, Any] = {"runtime": "onnx"}
        session.add(Profile(fleet_id=DEFAULT_FLEET, name="p", spec=spec))
    fabricate(database, ArtifactStore.open(None, folder=tmp_path), tmp_path, "net", "1", size=1000)
    with database.write() as session:
        variant = session.query(Variant).one()
        fixed = [{"name": "x", "dtype": "float32", "shape": [ROWS, 8]}]
        variant.manifest = {**(variant.manifest or {}), "inputs": fixed, "outputs": fixed}
        for device in ("one", "two"):
            serving = ServingReport("net", "1", variant.digest or "", "d", "onnx", "cpu", 0.0)
            facts = msgspec.structs.replace(HELLO.facts, features=(FEATURE,))
            reported = msgspec.structs.replace(HELLO, facts=facts, serving=(serving,))
            record_report(session, device, reported, utc_now())
    answering = Devices()
    return Desk(database, answering.dispatch), answering


@pytest.mark.parametrize("count", [1, ROWS, 4 * ROWS + 3])
def test_parts_have_as_many_rows_as_the_model_takes(desk: tuple[Desk, Devices], count: int) -> None:
    rows = np.random.default_rng(count).normal(size=(count, 8)).astype(np.float32)
    answer = gathered(*desk[0].infer(DEFAULT_FLEET, WANTED, read_request(*request_of({"x": rows}))), count)
    np.testing.assert_array_equal(answer.outputs["y"], rows * rows)
    assert set(desk[1].asked) == {ROWS}


def test_rows_of_which_too_few_fit_into_a_message_are_refused(desk: tuple[Desk, Devices]) -> None:
    rows = np.zeros((1, 100_000), np.float32)
    with pytest.raises(TooLargeError, match="takes 4 rows at once"):
        desk[0].infer(DEFAULT_FLEET, WANTED, read_request(*request_of({"x": rows})))
