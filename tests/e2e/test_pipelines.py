"""A pipeline of the configuration file on a real agent: a JPEG is dropped, a JSON line appears; nothing else is run."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.test_images import PROCESSING, datasets, push
from tests.fleet import LocalFleet, wait_until
from tests.images import COLORS, photo, write_color_net

TABLES = """
[[pipelines]]
name = "door"
model = "colors"
only = {{ score = 0.2 }}

[pipelines.source]
kind = "folder"
path = "{folder}/in"
then = "delete"

[[pipelines.sinks]]
kind = "file"
path = "{folder}/out.jsonl"
"""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"))
    try:
        fleet.start_server()
        (fleet.folder / "in").mkdir()
        fleet.start_agent("cam-1", tables=TABLES.format(folder=fleet.folder))
        fleet.post("/profiles", {"name": "cams", "runtime": "onnx", "precisions": ["fp32"]})
        wait_until("the device", lambda: [one for one in fleet.get("/devices")["items"] if one["profile"]])
        write_color_net(fleet.folder / "colors.onnx")
        (fleet.folder / "labels.txt").write_text("\n".join(COLORS))
        yield fleet
    finally:
        fleet.stop()


def problems(fleet: LocalFleet) -> dict[str, dict[str, object]]:
    return {one["code"]: one for one in fleet.get("/devices/cam-1")["problems"]}


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def pipeline_process(fleet: LocalFleet) -> psutil.Process | None:
    agent = psutil.Process(fleet.processes["cam-1"].pid)
    found = [one for one in agent.children() if "agent.pipelines.process" in one.cmdline()]
    return found[0] if found else None


def test_a_jpeg_is_dropped_and_a_line_appears(fleet: LocalFleet) -> None:
    out = fleet.folder / "out.jsonl"
    (fleet.folder / "in" / "first.jpg").write_bytes(photo().read_bytes())
    # No model serves yet: that is a problem of the device, and the file waits.
    wait_until("the problem", lambda: "door: the inference API answered 404" in str(problems(fleet)))
    assert problems(fleet)["pipeline_failed"]["ongoing"]

    *_, options = datasets(fleet)
    assert push(fleet, "colors@1", PROCESSING, *options).exit_code == 0
    fleet.build("colors@1", "cams")
    fleet.rollout("colors@1")
    first = wait_until("the line", lambda: lines(out))[0]
    assert first["source"] == "shoal/device/cam-1/pipelines/door"
    assert first["data"]["version"] == "1"
    assert first["data"]["item"]["file"] == "first.jpg"
    assert {one["name"] for one in first["data"]["outputs"]} == {"scores", "classes", "labels"}
    wait_until("the file to go", lambda: not (fleet.folder / "in" / "first.jpg").exists())
    wait_until("the end of the problem", lambda: not problems(fleet)["pipeline_failed"]["ongoing"])


def test_a_pipeline_that_dies_is_started_again_and_ends_with_its_agent(fleet: LocalFleet) -> None:
    out = fleet.folder / "out.jsonl"
    before = len(lines(out))
    old = wait_until("its process", lambda: pipeline_process(fleet))
    os.kill(old.pid, signal.SIGKILL)
    (fleet.folder / "in" / "second.jpg").write_bytes(photo().read_bytes())
    wait_until("the line", lambda: len(lines(out)) == before + 1)
    new = wait_until("its process", lambda: pipeline_process(fleet))
    assert new.pid != old.pid
    fleet.kill("cam-1")
    wait_until("its end", lambda: not new.is_running() or new.status() == psutil.STATUS_ZOMBIE)
    fleet.start_agent("cam-1")
    (fleet.folder / "in" / "third.jpg").write_bytes(photo().read_bytes())
    wait_until("the line", lambda: len(lines(out)) == before + 2)
