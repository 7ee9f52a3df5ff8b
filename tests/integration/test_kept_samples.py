"""What a device keeps of its requests, with its real supervisor and worker: nothing unless both sides want it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from agent.config import Config
from agent.mqtt import MqttMessage
from agent.protocol.codec import encode
from agent.protocol.delivery import Budget, DeliveryPolicy, Period
from agent.protocol.lifecycle import Phase
from agent.protocol.messages import DesiredDeployment
from agent.protocol.samples import SampleAck, SampleRequest, SamplesReport, Sampling, UploadPhase, UploadReport
from agent.protocol.topics import DeviceTopic, device_topic
from agent.samples.collecting import FOLDER, SampleConfig
from agent.samples.sample import Sample, read_sample
from tests.faults.device import NAME
from tests.fleet import wait_until, write_classifier
from tests.processes import descendants
from tests.real_device import RealDevice

ALLOWED = SampleConfig(allow=True)
SURE, UNSURE, LEAST_SURE = (np.eye(8, dtype=np.float32)[:1] * size for size in (9.0, 1.0, 0.1))


def started(device: RealDevice, folder: Path, **fields: Any) -> DesiredDeployment:
    path = folder / "m.onnx"
    write_classifier(path)
    deployment = device.deployment("d-1", path, "1")
    device.desire(deployment, **fields)
    device.await_phase("d-1", Phase.ACTIVE)
    return deployment


def asked(device: RealDevice, *rows: np.ndarray) -> None:
    for row in rows:
        assert device.infer(row).status_code == 200


def said(device: RealDevice) -> SamplesReport:
    assert device.link is not None
    found = device.link.reports[-1].samples
    assert found is not None
    return found


def upload(device: RealDevice) -> UploadReport | None:
    return next(iter(said(device).uploads), None)


def kept(folder: Path) -> list[Sample]:
    paths = (folder / FOLDER).glob("*.sample") if (folder / FOLDER).is_dir() else ()
    return sorted((read_sample(path) for path in paths), key=lambda one: one.confidence)


def counted(device: RealDevice, count: int) -> None:
    """Windows with so many requests were collected: what was chosen in them was handed over before."""
    wait_until("the windows", lambda: sum(one.requests for one in device.windows("d-1")) >= count)


def test_nothing_is_kept_unless_device_and_server_want_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, settings, fields in (
        ("neither", {}, {}),
        ("device", {"samples": ALLOWED}, {}),
        ("server", {}, {"sampling": (Sampling("m"),)}),
        ("other", {"samples": ALLOWED}, {"sampling": (Sampling("another"),)}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        with monkeypatch.context() as patch, RealDevice(folder / "state", patch, **settings) as device:
            started(device, folder, **fields)
            asked(device, LEAST_SURE, UNSURE)
            counted(device, 2)
            assert said(device).kept == 0
            assert said(device).allowed == ("samples" in settings)
        assert kept(folder / "state") == [], name
        assert not (folder / "state" / FOLDER).exists()
    assert not Config("d", tmp_path).samples.allow


def test_the_least_sure_are_kept_survive_the_worker_and_go_when_turned_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    wanted = Sampling("m", samples=3, below=0.6)
    with RealDevice(state, monkeypatch, samples=ALLOWED) as device:
        deployment = started(device, tmp_path, sampling=(wanted,))
        wait_until("sampling", lambda: said(device).models == ("m",))
        asked(device, SURE, UNSURE, LEAST_SURE, SURE)
        wait_until("two samples", lambda: len(kept(state)) == 2)
        least, other = kept(state)
        assert least.confidence < other.confidence < 0.6
        assert np.frombuffer(least.inputs[0].data, "<f4") == pytest.approx(LEAST_SURE[0])
        assert (least.version, least.digest) == ("1", deployment.read_manifest().digest)
        before = {one.pid for one in workers()}
        for one in workers():
            os.kill(one.pid, signal.SIGKILL)
        wait_until("another worker", lambda: {one.pid for one in workers()} - before and answers(device))
        assert len(kept(state)) == 2
        asked(device, LEAST_SURE, LEAST_SURE, LEAST_SURE, UNSURE)
        wait_until("as many as may be", lambda: len(kept(state)) == 3)
        device.desire(deployment)
        wait_until("nothing", lambda: said(device).models == () and not (state / FOLDER).exists())
        asked(device, LEAST_SURE)
        assert kept(state) == []


def workers() -> list[psutil.Process]:
    return descendants(os.getpid(), "agent.serving.worker")


def answers(device: RealDevice) -> bool:
    return device.infer(SURE).status_code == 200


def test_a_device_that_no_longer_allows_it_forgets_at_its_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    with monkeypatch.context() as patch, RealDevice(state, patch, samples=ALLOWED) as device:
        started(device, tmp_path, sampling=(Sampling("m"),))
        wait_until("sampling", lambda: said(device).models == ("m",))
        asked(device, LEAST_SURE)
        wait_until("a sample", lambda: len(kept(state)) == 1)
    with monkeypatch.context() as patch, RealDevice(state, patch, samples=ALLOWED) as device:
        wait_until("the sample of before", lambda: said(device).kept == 1)  # a restart alone forgets nothing
    with monkeypatch.context() as patch, RealDevice(state, patch) as device:
        assert said(device) == SamplesReport(allowed=False)
        assert not (state / FOLDER).exists()


def test_what_a_request_comes_to_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "state"
    request = SampleRequest("u-1", "m", 10, 1 << 20)
    with monkeypatch.context() as patch, RealDevice(state, patch) as device:
        deployment = started(device, tmp_path, sampling=(Sampling("m"),), sample_requests=(request,))
        wait_until("the refusal", lambda: (one := upload(device)) and one.reason == "not_allowed")
    (tmp_path / "more").mkdir()
    with (
        monkeypatch.context() as patch,
        RealDevice(tmp_path / "more" / "state", patch, samples=ALLOWED, link_type="cellular") as device,
    ):
        deployment = started(device, tmp_path / "more", sample_requests=(request,))
        wait_until("what is off", lambda: (one := upload(device)) and one.reason == "off")
        again = SampleRequest("u-2", "m", 10, 1 << 20)
        device.desire(deployment, sampling=(Sampling("m"),), sample_requests=(again,))
        wait_until("that there is none", lambda: (one := upload(device)) and one.reason == "none_kept")
        asked(device, LEAST_SURE)
        wait_until("a sample", lambda: said(device).kept == 1 or len(kept(tmp_path / "more" / "state")) == 1)
        spent = DeliveryPolicy(budgets={"cellular": (Budget(1000, Period.DAY),)})
        third = SampleRequest("u-3", "m", 10, 1 << 20, spent)
        device.desire(deployment, sampling=(Sampling("m"),), sample_requests=(third,))
        waits = wait_until("the budget", lambda: (one := upload(device)) and one.waiting)
        assert waits.reason.value == "budget"
        assert device.link is not None
        assert device.link.pieces == []
        let_go = SampleRequest("u-3", "m", 10, 1 << 20)  # the same one, after the server was told of another policy
        device.desire(deployment, sampling=(Sampling("m"),), sample_requests=(let_go,))
        wait_until("a piece of it", lambda: device.link and [one.upload_id for one in device.link.pieces] == ["u-3"])
        fourth = SampleRequest("u-4", "m", 10, 1 << 20)
        device.desire(deployment, sampling=(Sampling("m"),), sample_requests=(fourth,))
        piece = wait_until("a piece", lambda: device.link and device.link.pieces[1:] and device.link.pieces[-1])
        assert piece.upload_id == "u-4"
        ack = SampleAck("u-4", piece.digest, piece.size, stored=True)
        device.link.put(_message(ack))
        done = wait_until("the end", lambda: (one := upload(device)) and one.phase is UploadPhase.DONE and one)
        assert (done.samples, done.bytes) == (1, piece.size)
        wait_until("what was sent to go", lambda: kept(tmp_path / "more" / "state") == [])


def _message(ack: SampleAck) -> MqttMessage:
    return MqttMessage(device_topic(NAME, DeviceTopic.SAMPLES_ACK), encode(ack))
