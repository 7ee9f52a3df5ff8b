"""What a device says of its models beyond counts, through its real worker: and that a worker that hangs is noticed."""

from __future__ import annotations

import threading
from pathlib import Path

import httpx
import numpy as np
import pytest

from agent.protocol.histogram import merge
from agent.protocol.lifecycle import Phase
from agent.protocol.sketch import bucket_of, confidence_bin
from tests.fleet import wait_until, write_classifier
from tests.real_device import RealDevice
from tests.traps import ARMED, write_trapped

ROW = np.array([[0.0, 4.0, 0.0, 0, 0, 0, 0, 0]], np.float32)


def test_windows_say_how_sure_it_was_what_it_answered_and_what_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_classifier(tmp_path / "1.onnx")
    with RealDevice(tmp_path / "state", monkeypatch) as device:
        device.desire(device.deployment("d1", tmp_path / "1.onnx", "1"))
        device.await_phase("d1", Phase.ACTIVE)
        for _ in range(20):
            assert device.infer(ROW).status_code == 200
        wait_until("windows", lambda: sum(one.requests for one in device.windows("d1")) == 20)
        predicted: dict[int, int] = {}
        means: dict[int, int] = {}
        confidence: dict[int, int] = {}
        for window in device.windows("d1"):
            merge(predicted, window.predicted)
            merge(confidence, window.confidence)
            merge(means, window.inputs["x"].mean)
        assert predicted == {1: 20}
        assert confidence == {confidence_bin(float(np.exp(4) / (np.exp(4) + 2))): 20}
        assert means == {bucket_of(0.5): 20}
        assert all(window.crashes == 0 for window in device.windows("d1"))


def test_an_inference_that_never_ends_restarts_the_worker_and_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_trapped(tmp_path / "1.onnx", "slow", rounds=1_000_000_000)
    with RealDevice(tmp_path / "state", monkeypatch, hang_s=5.0) as device:
        device.desire(device.deployment("d1", tmp_path / "1.onnx", "1"))
        device.await_phase("d1", Phase.ACTIVE)
        endless = ROW.copy()
        endless[0, 7] = ARMED + 1
        ended: list[Exception] = []

        def ask() -> None:
            try:
                device.infer(endless)
            except httpx.TransportError as error:
                ended.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        wait_until("a crash in a window", lambda: sum(one.crashes for one in device.windows("d1")))
        asking.join(60)
        assert ended, "nothing answered it"
        assert sum(one.crashes for one in device.windows("d1")) == 1
        assert device.link is not None
        assert [one.code for one in device.link.reports[-1].problems] == ["worker_hung"]
        wait_until("an answer", lambda: device.infer(ROW).status_code == 200)
        assert device.await_phase("d1", Phase.ACTIVE).failure is None
