"""A version beside the one that serves, on a real worker: copies are compared or a share is answered; nobody loses."""

from __future__ import annotations

import datetime as dt
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np
import pytest

from agent.protocol.delivery import DeliveryPolicy, Window
from agent.protocol.errors import WireErrorCode
from agent.protocol.histogram import merge
from agent.protocol.lifecycle import Phase
from agent.protocol.messages import Exposure, ExposureMode
from tests.fleet import wait_until, write_classifier
from tests.real_device import RealDevice
from tests.traps import ARMED, write_trapped

SAME = np.zeros((1, 8), np.float32)  # both versions answer class 0
OTHER = np.eye(8, dtype=np.float32)[1:2]  # they differ
SHADOW = Exposure(ExposureMode.SHADOW, 1.0)


def split(share: float) -> Exposure:
    return Exposure(ExposureMode.SPLIT, share)


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RealDevice]:
    """It serves version 1, which is right; version 2 answers other classes."""
    write_classifier(tmp_path / "1.onnx")
    write_classifier(tmp_path / "2.onnx", right=False)
    with RealDevice(tmp_path / "state", monkeypatch) as device:
        device.desire(device.deployment("d1", tmp_path / "1.onnx", "1"))
        device.await_phase("d1", Phase.ACTIVE)
        yield device


def expose(device: RealDevice, tmp_path: Path, exposure: Exposure | None, version: str = "2", **fields: Any) -> None:
    device.desire(device.deployment("d2", tmp_path / f"{version}.onnx", version, exposure=exposure, **fields))


def in_force(device: RealDevice, exposure: Exposure, deployment_id: str = "d2") -> None:
    """Wait until a version runs beside, as the device says."""

    def said() -> bool:
        found = device.report(deployment_id)
        return found is not None and found.phase is Phase.EXPOSED and found.exposure == exposure

    wait_until(f"{exposure}", said)


class Client:
    """Asks all the time, and wants every request answered."""

    def __init__(self, device: RealDevice, row: Callable[[], np.ndarray] = lambda: OTHER) -> None:
        self._device, self._row = device, row
        self.versions: list[str] = []
        self.classes: list[int] = []
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self._stop.wait(0.005):
            try:
                answer = self._device.infer(self._row())
            except httpx.TransportError as error:
                self.failures.append(repr(error))
                continue
            if answer.status_code == 200:
                self.versions.append(answer.json()["model_version"])
                self.classes.append(int(np.argmax(answer.json()["outputs"][0]["data"])))
            else:
                self.failures.append(answer.text)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(70)


def total(device: RealDevice, deployment_id: str, field: str) -> int:
    return sum(getattr(one, field) for one in device.windows(deployment_id))


def test_copies_are_answered_and_compared_and_go_nowhere(device: RealDevice, tmp_path: Path) -> None:
    expose(device, tmp_path, SHADOW)
    in_force(device, SHADOW)
    for row in [SAME] * 10 + [OTHER] * 15:
        answer = device.infer(row).json()
        assert answer["model_version"] == "1"
        assert int(np.argmax(answer["outputs"][0]["data"])) == int(row is OTHER)
    wait_until("the copies", lambda: total(device, "d2", "compared") == 25)
    expected = {"requests": 25, "shadowed": 25, "disagreed": 15, "dropped": 0, "errors": 0}
    assert {field: total(device, "d2", field) for field in expected} == expected
    assert total(device, "d1", "shadowed") == total(device, "d1", "compared") == 0
    wait_until("the others", lambda: total(device, "d1", "requests") == 25)
    found: dict[str, dict[int, int]] = {"d1": {}, "d2": {}}
    for key, predicted in found.items():
        for window in device.windows(key):
            merge(predicted, window.predicted)
    assert found == {"d1": {0: 10, 1: 15}, "d2": {0: 25}}


def test_labels_tell_how_both_versions_did(device: RealDevice, tmp_path: Path) -> None:
    expose(device, tmp_path, SHADOW)
    in_force(device, SHADOW)
    assert device.infer(OTHER, id="mine").status_code == 200
    wait_until("the copy", lambda: total(device, "d2", "compared") == 1)
    said = httpx.post(
        f"http://{device.address}/v2/models/m/feedback", json={"labels": [{"id": "mine", "label": 1}]}, timeout=30
    )
    assert said.json() == {"matched_rows": 1, "unknown_ids": 0}
    cells = wait_until("feedback", lambda: [one.confusion for one in device.windows("d2") if one.confusion])
    assert cells == [((1, 0, 1),)]
    assert [one.confusion for one in device.windows("d1") if one.confusion] == [((1, 1, 1),)]


def test_nobody_notices_how_copies_begin_and_end_and_the_version_is_let_in(device: RealDevice, tmp_path: Path) -> None:
    with Client(device) as asking:
        expose(device, tmp_path, SHADOW)
        in_force(device, SHADOW)
        wait_until("copies", lambda: total(device, "d2", "compared") > 20)
        device.desire(device.deployment("d1", tmp_path / "1.onnx", "1"))
        device.await_phase("d2", Phase.SUPERSEDED)
        assert set(asking.versions) == {"1"}
        again = device.deployment("d3", tmp_path / "2.onnx", "2", exposure=SHADOW)
        device.desire(again)
        in_force(device, SHADOW, "d3")
        wait_until("copies", lambda: total(device, "d3", "compared") > 20)
        assert set(asking.versions) == {"1"}
        assert set(asking.classes) == {1}
        device.desire(device.deployment("d3", tmp_path / "2.onnx", "2"))
        device.await_phase("d3", Phase.ACTIVE)
        wait_until("answers of version 2", lambda: asking.versions[-1] == "2")
    assert asking.failures == []
    assert device.await_phase("d1", Phase.SUPERSEDED).failure is None
    changes = [one for one, after in pairwise(asking.versions) if one != after]
    assert changes == ["1"]
    served = total(device, "d3", "requests") - total(device, "d3", "shadowed")
    assert served <= asking.versions.count("2")


def test_a_share_of_the_requests_is_answered_by_the_new_version(device: RealDevice, tmp_path: Path) -> None:
    with Client(device) as asking:
        expose(device, tmp_path, split(0.5))
        in_force(device, split(0.5))
        wait_until("both versions", lambda: {"1", "2"} <= set(asking.versions))
    assert asking.failures == []
    plain = [device.infer(OTHER).json() for _ in range(20)]
    assert Counter(one["model_version"] for one in plain) == {"1": 10, "2": 10}
    named = [device.infer(OTHER, id=f"user {number % 10}").json() for number in range(40)]
    assert len({(one["id"], one["model_version"]) for one in named}) == 10, "the same id, the same version"
    assert {one["model_version"] for one in named} == {"1", "2"}
    assert httpx.get(f"http://{device.address}/v2/models/m/versions/1/ready", timeout=10).status_code == 200
    answered = Counter(asking.versions + [one["model_version"] for one in plain + named])
    wait_until("windows", lambda: total(device, "d2", "requests") == answered["2"])
    wait_until("windows", lambda: total(device, "d1", "requests") == answered["1"])
    assert total(device, "d2", "shadowed") == 0
    expose(device, tmp_path, split(1.0))
    in_force(device, split(1.0))
    assert {device.infer(OTHER).json()["model_version"] for _ in range(10)} == {"2"}
    one_version = httpx.post(
        f"http://{device.address}/v2/models/m/versions/1/infer",
        json={"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 8], "data": [0.0] * 8}]},
        timeout=10,
    )
    assert one_version.json()["model_version"] == "1", "who asks for a version gets it"
    expose(device, tmp_path, split(0.0))
    in_force(device, split(0.0))
    assert {device.infer(OTHER).json()["model_version"] for _ in range(10)} == {"1"}


@pytest.mark.parametrize("exposure", [SHADOW, split(0.5)])
def test_a_version_that_fails_is_taken_away_and_no_client_loses(
    device: RealDevice, tmp_path: Path, exposure: Exposure
) -> None:
    write_trapped(tmp_path / "3.onnx", "error")
    row = SAME.copy()
    row[0, 7] = ARMED + 1
    with Client(device, lambda: row) as asking:
        expose(device, tmp_path, exposure, "3")
        failed = device.await_phase("d2", Phase.ROLLED_BACK)
    assert failed.failure is not None
    assert failed.failure.code is WireErrorCode.PROBATION_FAILED
    assert "requests failed" in failed.failure.detail
    assert asking.failures == []
    assert set(asking.versions) == {"1"}
    wait_until("its errors", lambda: total(device, "d2", "errors") >= 5)
    assert total(device, "d1", "errors") == 0
    assert device.infer(OTHER).json()["model_version"] == "1"


def test_a_version_whose_copies_end_the_process_is_taken_away_alone(device: RealDevice, tmp_path: Path) -> None:
    write_trapped(tmp_path / "3.onnx", "crash")
    expose(device, tmp_path, SHADOW, "3")
    in_force(device, SHADOW)
    row = SAME.copy()
    row[0, 7] = ARMED + 1
    assert device.infer(row).json()["model_version"] == "1", "it was answered before its copy was tried"
    failed = device.await_phase("d2", Phase.ROLLED_BACK)
    assert failed.failure is not None
    assert failed.failure.code is WireErrorCode.WORKER_CRASHED
    wait_until("version 1 again", lambda: _version(device) == "1")
    wait_until("the count", lambda: total(device, "d2", "crashes") == 1)
    assert total(device, "d1", "crashes") == 0
    device.await_phase("d1", Phase.ACTIVE)
    assert device.infer(row).json()["model_version"] == "1"


def _version(device: RealDevice) -> str | None:
    try:
        answer = device.infer(SAME)
    except httpx.TransportError:
        return None
    return str(answer.json()["model_version"]) if answer.status_code == 200 else None


def test_it_is_let_in_no_sooner_than_its_maintenance_window_opens(device: RealDevice, tmp_path: Path) -> None:
    expose(device, tmp_path, SHADOW)
    in_force(device, SHADOW)
    later = (dt.datetime.now(dt.UTC).weekday() + 3) % 7
    closed = DeliveryPolicy(activate=(Window((later,), 0, 60, "UTC"),))
    expose(device, tmp_path, None, delivery=closed)

    def waits() -> bool:
        found = device.report("d2")
        return found is not None and found.waiting is not None and found.phase is Phase.EXPOSED

    wait_until("its waiting", waits)
    assert device.infer(SAME).json()["model_version"] == "1"
    expose(device, tmp_path, None)
    device.await_phase("d2", Phase.ACTIVE)
    assert device.infer(SAME).json()["model_version"] == "2"


def test_where_nothing_serves_a_version_that_is_exposed_serves_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_classifier(tmp_path / "2.onnx")
    with RealDevice(tmp_path / "state", monkeypatch) as device:
        expose(device, tmp_path, SHADOW)
        device.await_phase("d2", Phase.ACTIVE)
        assert device.infer(SAME).json()["model_version"] == "2"
