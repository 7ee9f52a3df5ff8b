"""Commands on a device: the real supervisor and its real worker; link and signatures are made up."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from agent.commands.config import CommandConfig
from agent.protocol.commands import CommandKind, CommandPhase
from agent.protocol.lifecycle import Phase
from tests.fleet import wait_until, write_classifier
from tests.real_device import RealDevice

ROW = np.eye(8, dtype=np.float32)[:1]


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RealDevice]:
    logging.getLogger("agent").setLevel(logging.INFO)
    path = tmp_path / "m.onnx"
    write_classifier(path)
    with RealDevice(tmp_path / "state", monkeypatch) as one:
        one.desire(one.deployment("d1", path, "1"))
        one.await_phase("d1", Phase.ACTIVE)
        yield one


def live(device: RealDevice) -> bool:
    return httpx.get(f"http://{device.address}/v2/health/live", timeout=10).status_code == 200


def test_the_runtime_is_restarted_once_and_no_request_is_lost(device: RealDevice) -> None:
    stop, answers, failures = threading.Event(), [], []

    def ask() -> None:
        while not stop.is_set():
            try:
                answers.append(device.infer(ROW).status_code)
            except httpx.HTTPError as error:
                failures.append(repr(error))

    clients = [threading.Thread(target=ask) for _ in range(3)]
    for one in clients:
        one.start()
    wait_until("requests", lambda: len(answers) > 20)
    device.command("c1", "restart-runtime")
    device.command("c1", "restart-runtime")
    end = device.await_end("c1")
    asked = len(answers)
    wait_until("more requests", lambda: len(answers) > asked + 20)
    stop.set()
    for one in clients:
        one.join()
    assert end.phase is CommandPhase.SUCCEEDED, end
    assert end.result is not None
    assert (end.result.models, end.result.took_s > 0) == (("m",), True)
    assert failures == []
    assert set(answers) == {200}
    assert device.link is not None
    report = device.link.reports[-1]
    assert report.problems == (), "a replacement on purpose is no problem of the device"
    assert [one.phase for one in report.deployments] == [Phase.ACTIVE]
    device.command("c1", "restart-runtime")
    wait_until("the same answer again", lambda: device.answers("c1").count(end) == 2)
    crashes = [one.crashes for one in device.windows("d1")]
    assert sum(crashes) == 0


def test_models_are_benchmarked_in_a_process_of_their_own(device: RealDevice) -> None:
    device.command("c1", "benchmark", seconds=0.3)
    end = device.await_end("c1")
    assert end.phase is CommandPhase.SUCCEEDED, end
    assert end.result is not None
    (found,) = end.result.benchmarks
    assert (found.model, found.version, found.provider, found.failure) == ("m", "1", "cpu", "")
    assert 0 < found.latency_p50_ms <= found.latency_p95_ms <= found.latency_p99_ms
    assert found.runs >= 20
    assert found.batch == 8
    assert found.batch_rows_per_s > 0
    assert not found.golden
    assert sum(one.requests for one in device.windows("d1")) == 0
    device.command("c2", "benchmark", models=("other",))
    assert (device.await_end("c2").phase, device.await_end("c2").code) == (CommandPhase.FAILED, "nothing_serves")


def test_logs_come_with_those_of_the_worker_and_follow_until_they_are_cancelled(device: RealDevice) -> None:
    logging.getLogger("agent.test").error("before \x1b[31m with password=hunter22")
    device.command("c1", "logs", lines=5000)
    end = device.await_end("c1")
    assert end.phase is CommandPhase.SUCCEEDED
    lines = [line for answer in device.answers("c1") for line in answer.lines]
    assert [one.sequence for one in lines] == sorted(one.sequence for one in lines)
    mine = next(one for one in lines if one.logger == "agent.test")
    assert mine.text == "before ?[31m with password=…"
    assert end.result is not None
    assert end.result.lines == len(lines)
    device.command("c2", "logs", lines=0, follow=True, level="ERROR")
    wait_until("its begin", lambda: device.answers("c2"))
    time.sleep(0.6)
    logging.getLogger("agent.test").warning("too low")
    logging.getLogger("agent.test").error("after")
    wait_until("the line", lambda: [one.text for one in device.answers("c2") for one in one.lines] == ["after"])
    device.command("c2", "logs", cancel=True)
    assert device.await_end("c2").phase is CommandPhase.CANCELLED
    device.command("c3", "logs", follow=True, timeout_s=1.0)
    assert device.await_end("c3").phase is CommandPhase.SUCCEEDED


def test_facts_are_measured_again_and_reported(device: RealDevice) -> None:
    assert device.link is not None
    assert device.link.reports[-1].facts.commands == {kind.value: True for kind in CommandKind}
    before = len(device.link.reports)
    device.command("c1", "facts")
    end = device.await_end("c1")
    assert (end.phase, end.result is not None and end.result.changed) == (CommandPhase.SUCCEEDED, ())
    assert len(device.link.reports) > before


def test_what_is_not_to_be_done_is_refused_with_the_reason(device: RealDevice) -> None:
    device.command("c1", "explode")
    assert device.await_end("c1").code == "unknown_command"
    device.command("c2", "restart-runtime", late_s=30.0)
    assert device.await_end("c2").code == "expired"
    device.command("c3", "benchmark", cancel=True)
    assert device.await_end("c3").phase is CommandPhase.CANCELLED
    device.command("c3", "benchmark")
    wait_until("the same answer", lambda: len(device.answers("c3")) == 2)
    assert {one.phase for one in device.answers("c3")} == {CommandPhase.CANCELLED}
    device.command("c4", "benchmark", seconds=20.0)
    wait_until("its begin", lambda: device.answers("c4"))
    device.command("c5", "benchmark")
    assert device.await_end("c5").code == "busy"
    device.command("c4", "benchmark", cancel=True)
    assert device.await_end("c4").phase is CommandPhase.CANCELLED
    device.command("c6", "benchmark", seconds=20.0, timeout_s=0.5)
    assert device.await_end("c6").phase is CommandPhase.TIMED_OUT
    device.command("c7", "identify")
    assert "nothing is configured" in device.await_end("c7").detail


def test_what_its_owner_does_not_allow_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (sys.executable, "-c", "import sys; print('blink', sys.argv[1])", "twice; rm -rf /")
    config = CommandConfig(frozenset({CommandKind.LOGS}), program)
    with RealDevice(tmp_path / "state", monkeypatch, commands=config) as device:
        assert device.link is not None
        assert device.link.reports[-1].facts.commands["logs"] is False
        device.command("c1", "logs")
        end = device.await_end("c1")
        assert (end.phase, end.code) == (CommandPhase.REFUSED, "not_allowed")
        assert "commands.logs = false" in end.detail
        device.command("c2", "identify")
        end = device.await_end("c2")
        assert end.phase is CommandPhase.SUCCEEDED, end
        assert end.result is not None
        assert end.result.output == "blink twice; rm -rf /\n"


def test_what_was_begun_when_the_agent_ended_is_not_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (sys.executable, "-c", f"open({str(tmp_path / 'ran')!r}, 'a').write('x'); import time; time.sleep(60)")
    config = CommandConfig(identify_program=program)
    with RealDevice(tmp_path / "state", monkeypatch, commands=config) as device:
        device.command("c1", "identify")
        wait_until("the program", (tmp_path / "ran").exists)
    with RealDevice(tmp_path / "state", monkeypatch, commands=config) as device:
        device.command("c1", "identify")
        end = device.await_end("c1")
        assert (end.phase, end.code) == (CommandPhase.FAILED, "interrupted")
    assert (tmp_path / "ran").read_text() == "x"
