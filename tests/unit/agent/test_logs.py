"""Logs as JSON: one object a record, ids from the context, from the record and from the process, no secrets."""

from __future__ import annotations

import datetime as dt
import io
import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from agent.protocol.logs import JsonFormatter, known_ids, log_ids, note_ids


@pytest.fixture
def logger() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter({"device": "camera-1"}))
    made = logging.getLogger("tests.logs")
    made.addHandler(handler)
    made.setLevel("INFO")
    made.propagate = False
    yield made, stream
    made.removeHandler(handler)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_record_is_one_object_on_one_line(logger: tuple[logging.Logger, io.StringIO]) -> None:
    log, stream = logger
    before = dt.datetime.now(dt.UTC)
    log.info("first line\nsecond “line” of %s", "it")
    [said] = lines(stream)
    assert said.keys() == {"time", "level", "logger", "message", "device"}
    assert (said["level"], said["logger"], said["device"]) == ("INFO", "tests.logs", "camera-1")
    assert said["message"] == "first line\nsecond “line” of it"
    assert said["time"].endswith("Z")
    assert abs((dt.datetime.fromisoformat(said["time"]) - before).total_seconds()) < 60


def test_ids_come_from_the_context_and_the_record_wins(logger: tuple[logging.Logger, io.StringIO]) -> None:
    log, stream = logger
    with log_ids(request_id="r1", fleet="f1"):
        with log_ids(rollout="o1"):
            log.info("both")
            note_ids(fleet="f2")
            log.info("noted", extra={"rollout": "o2", "deployment": "d1", "trace_id": None})
        log.info("around")
    note_ids(fleet="nobody")
    log.info("after")
    shown = [
        {key: value for key, value in one.items() if key not in {"time", "level", "logger"}} for one in lines(stream)
    ]
    mine = {"device": "camera-1"}
    assert shown == [
        {"message": "both", "request_id": "r1", "fleet": "f1", "rollout": "o1", **mine},
        {"message": "noted", "request_id": "r1", "fleet": "f2", "rollout": "o2", "deployment": "d1", **mine},
        {"message": "around", "request_id": "r1", "fleet": "f1", **mine},
        {"message": "after", **mine},
    ]


def test_threads_have_ids_of_their_own() -> None:
    seen: list[object] = []
    with log_ids(rollout="o1"):
        thread = threading.Thread(target=lambda: seen.append(dict(known_ids())))
        thread.start()
        thread.join()
    assert seen == [{}]


def test_an_exception_is_told_without_its_secrets(logger: tuple[logging.Logger, io.StringIO]) -> None:
    log, stream = logger
    try:
        int("mqtt://user:hunter2@host refused")
    except ValueError:
        log.exception("Authorization: Bearer abcdefghijkl")
    [said] = lines(stream)
    assert "hunter2" not in stream.getvalue()
    assert "abcdefghijkl" not in stream.getvalue()
    assert said["exception"].startswith("Traceback")
    assert "mqtt://user:…@host refused" in said["exception"]
