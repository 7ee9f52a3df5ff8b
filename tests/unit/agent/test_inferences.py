"""Parts of inference requests on a device: bounded, off where the owner says so, answered whatever the API does."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from agent.errors import ConfigError
from agent.inferences import WAITING, InferenceConfig, Inferences, read_inference
from agent.protocol.codec import decode, encode
from agent.protocol.errors import WireError, WireErrorCode
from agent.protocol.limits import LIMITS
from agent.protocol.parts import Hop, InferPart, PartAnswer

REPLY = b"HTTP/1.1 %s\r\nContent-Length: %d\r\nInference-Header-Content-Length: 2\r\nRetry-After: 3\r\n\r\n%s"


class Api:
    """Answers requests over a Unix socket with what it was told, while its gate is open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reply = REPLY % (b"200 OK", 4, b"{}ab")
        self.gate = threading.Event()
        self.gate.set()
        self.heads: list[bytes] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(1 << 20):
                self.heads.append(data.split(b"\r\n")[0])
                self.gate.wait()
                if not self.reply:
                    return
                with contextlib.suppress(BrokenPipeError):  # its test is over
                    connection.sendall(self.reply)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    found = Api(tmp_path / "api.sock")
    yield found
    found.gate.set()
    found.close()


@pytest.fixture
def answers() -> list[PartAnswer]:
    return []


@pytest.fixture
def inferences(api: Api, answers: list[PartAnswer]) -> Iterator[Inferences]:
    found = Inferences(InferenceConfig(), lambda: ("", str(api.path)), answers.append)
    yield found
    found.stop()


def part(number: int = 0, **fields: object) -> InferPart:
    return msgspec.structs.replace(InferPart(f"p{number}", 1, "net", b"{}xyz", 2), **fields)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_part_is_handed_on_as_it_is(api: Api, inferences: Inferences, answers: list[PartAnswer]) -> None:
    inferences.received(part(version="2 b"))
    until(lambda: bool(answers))
    assert api.heads == [b"POST /v2/models/net/versions/2%20b/infer HTTP/1.1"]
    answer = answers[0]
    assert (answer.part_id, answer.attempt, answer.status) == ("p0", 1, 200)
    assert (answer.body, answer.header_length) == (b"{}ab", 2)
    assert answer.infer_s > 0
    assert decode(encode(answer), PartAnswer) == answer


def test_what_the_api_refuses_is_told_in_its_words(api: Api, inferences: Inferences, answers: list[PartAnswer]) -> None:
    body = b'{"error": "full"}'
    api.reply = REPLY % (b"503 Busy", len(body), body)
    inferences.received(part())
    until(lambda: bool(answers))
    assert (answers[0].status, answers[0].retry_after_s, answers[0].body) == (503, 3.0, b"")
    assert "full" in answers[0].error


def test_an_answer_that_no_message_holds_is_said_to_be_one(
    api: Api, inferences: Inferences, answers: list[PartAnswer]
) -> None:
    size = LIMITS.part_bytes + 1
    api.reply = REPLY % (b"200 OK", size, bytes(size))
    inferences.received(part())
    until(lambda: bool(answers))
    assert (answers[0].status, answers[0].body) == (413, b"")


def test_beyond_its_bound_it_refuses_and_keeps_what_it_took(
    api: Api, inferences: Inferences, answers: list[PartAnswer]
) -> None:
    api.gate.clear()
    for number in range(WAITING + 3):
        inferences.received(part(number))
    assert [answer.status for answer in answers] == [429] * 3
    assert all(answer.retry_after_s > 0 for answer in answers)
    api.gate.set()
    until(lambda: len(answers) == WAITING + 3)
    assert sorted(answer.part_id for answer in answers if answer.status == 200) == sorted(
        f"p{number}" for number in range(WAITING)
    )
    inferences.received(part(99))
    until(lambda: answers[-1].part_id == "p99")
    assert answers[-1].status == 200


def test_bytes_that_wait_are_bounded_too(api: Api, inferences: Inferences, answers: list[PartAnswer]) -> None:
    api.gate.clear()
    large = part(body=bytes(6 << 20))
    for _ in range(3):
        inferences.received(large)
    assert [answer.status for answer in answers] == [429]


def test_a_worker_that_ends_meanwhile_is_said(api: Api, inferences: Inferences, answers: list[PartAnswer]) -> None:
    api.reply = b""
    inferences.received(part())
    until(lambda: bool(answers))
    assert answers[0].status == 502


def test_what_is_late_is_not_begun(api: Api, inferences: Inferences, answers: list[PartAnswer]) -> None:
    api.gate.clear()
    for number in range(2):
        inferences.received(part(number))
    until(lambda: len(api.heads) == 2)
    inferences.received(part(2, deadline_ms=1))
    time.sleep(0.01)
    api.gate.set()
    until(lambda: len(answers) == 3)
    assert {answer.part_id: answer.status for answer in answers} == {"p0": 200, "p1": 200, "p2": 504}
    assert len(api.heads) == 2


def test_nobody_there_may_be_asked_again(tmp_path: Path, answers: list[PartAnswer]) -> None:
    inferences = Inferences(InferenceConfig(), lambda: ("", str(tmp_path / "none.sock")), answers.append)
    inferences.received(part())
    until(lambda: bool(answers))
    assert (answers[0].status, answers[0].retry_after_s) == (503, 1.0)
    inferences.stop()


def test_the_owner_may_forbid_it(answers: list[PartAnswer]) -> None:
    inferences = Inferences(read_inference({"remote": False}), lambda: ("", ""), answers.append)
    inferences.received(part())
    assert answers[0].status == 403
    assert "remote = false" in answers[0].error
    with pytest.raises(ConfigError, match=r"inference\.remote: must be true or false"):
        read_inference({"remote": "no"})
    with pytest.raises(ConfigError, match="inference"):
        read_inference({"remot": True})


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"body": bytes(LIMITS.part_bytes + 1)}, WireErrorCode.TOO_LARGE),
        ({"header_length": 99}, WireErrorCode.MALFORMED),
        ({"part_id": "a/b"}, WireErrorCode.MALFORMED),
        ({"model": "m" * 200}, WireErrorCode.MALFORMED),
        ({"deadline_ms": 0}, WireErrorCode.MALFORMED),
        ({"route": (Hop("d", "m"),) * 17}, WireErrorCode.TOO_LARGE),
        ({"route": (Hop("d/e", "m"),)}, WireErrorCode.MALFORMED),
        ({"route": (Hop("d", "m", address="a b"),)}, WireErrorCode.MALFORMED),
    ],
)
def test_a_part_is_measured_before_it_is_acted_on(fields: dict[str, object], code: WireErrorCode) -> None:
    with pytest.raises(WireError) as refused:
        decode(encode(part(**fields)), InferPart)
    assert refused.value.code is code


@pytest.mark.parametrize(
    "fields",
    [{"status": 99}, {"infer_s": -1.0}, {"queue_s": float("nan")}, {"hops": (1.0,) * 17}, {"error": "x" * 2001}],
)
def test_an_answer_is_measured_too(fields: dict[str, object]) -> None:
    answer = msgspec.structs.replace(PartAnswer("p", 0, 200), **fields)
    with pytest.raises(WireError):
        decode(encode(answer), PartAnswer)


def test_what_is_unknown_is_ignored_and_what_is_missing_has_a_default() -> None:
    told = {"part_id": "p", "attempt": 0, "model": "m", "body": b"{}", "header_length": 2, "later": {"a": 1}}
    found = decode(msgspec.msgpack.encode(told), InferPart)
    assert (found.version, found.route) == (None, ())
