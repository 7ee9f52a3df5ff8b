"""The supervisor's side of verifying, with the real process that judges; only the server is a stand-in."""

from __future__ import annotations

import os
import queue
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from agent.config import Config
from agent.protocol.codec import decode, encode
from agent.protocol.errors import WireErrorCode
from agent.protocol.messages import TrustNeed, TrustPiece
from agent.update.trust_ipc import Target
from agent.update.verify import TrustSaid, Verifier
from tests.tuf_repository import TufRepository
from tests.unit.agent.test_updater import manifest

ONE = manifest("a")
SIGNED = msgspec.json.encode(ONE)


class Device:
    """A supervisor's loop in small."""

    connected = True

    def __init__(self, folder: Path, repository: TufRepository, **config: str) -> None:
        self.repository = repository
        self.silent = False
        self.asked = 0
        self.answers: dict[str, WireErrorCode | None] = {}
        self._words: queue.Queue[TrustSaid] = queue.Queue()
        self.verifier = Verifier(
            Config("d", folder, **config),
            self,
            self._words.put,
            say_need=self._need,
            answered=lambda key, code, _: self.answers.update({key: code}),
        )

    def _need(self, need: TrustNeed) -> None:
        self.asked += 1
        if not self.silent:
            self.verifier.piece(decode(self.repository.answer(encode(need)), TrustPiece))

    def turn(self, until: Callable[[], object], seconds: float = 60.0, *, hurry: float = 1.0) -> bool:
        """Let time pass, `hurry` times as fast, until something holds; false when it does not in so many seconds."""
        start = time.monotonic()
        while not until():
            if time.monotonic() - start > seconds:
                return False
            now = start + (time.monotonic() - start) * hurry
            self.verifier.tick(now)
            try:
                self.verifier.said(self._words.get(timeout=0.02), now)
            except queue.Empty:
                continue
        return True

    def process(self) -> int | None:
        running = self.verifier._process
        return running.pid if running else None


@pytest.fixture
def repository() -> TufRepository:
    found = TufRepository()
    found.add("model.m", ONE.target_path, SIGNED)
    return found


@pytest.fixture
def device(tmp_path: Path, repository: TufRepository) -> Iterator[Device]:
    found = Device(tmp_path, repository)
    yield found
    found.verifier.stop()


def test_what_waits_is_judged_together(device: Device) -> None:
    forged = SIGNED.replace(b'"size":10', b'"size":11')
    device.verifier.check("good", (Target(ONE.target_path, SIGNED),))
    device.verifier.check("forged", (Target(ONE.target_path, forged),))
    device.verifier.check("one of two", (Target(ONE.target_path, SIGNED), Target("m/2/w.json", b"{}")))
    assert device.turn(lambda: len(device.answers) == 3)
    assert device.answers == {
        "good": None,
        "forged": WireErrorCode.UNTRUSTED,
        "one of two": WireErrorCode.UNSIGNED,
    }
    assert device.repository.asked.count("timestamp.json") == 1
    assert device.turn(lambda: device.process() is None), "the process ends, and its memory with it"


def test_a_link_that_is_down_and_a_server_that_is_silent_fail_nothing(device: Device) -> None:
    device.connected, device.silent = False, True
    device.verifier.check("d", (Target(ONE.target_path, SIGNED),))
    assert not device.turn(lambda: device.asked, 0.3)
    assert device.process() is None
    device.connected = True
    assert device.turn(lambda: device.asked >= 6, hurry=20), "asked again, given up, and begun anew"
    assert not device.answers
    device.silent = False
    device.verifier.link_up()
    assert device.turn(lambda: device.answers, hurry=20)
    assert device.answers == {"d": None}


def test_a_process_that_is_killed_is_started_again(device: Device) -> None:
    device.silent = True
    device.verifier.check("d", (Target(ONE.target_path, SIGNED),))
    assert device.turn(lambda: device.asked)
    os.kill(device.process() or 0, signal.SIGKILL)
    device.silent = False
    assert device.turn(lambda: device.answers, hurry=5)
    assert device.answers == {"d": None}


def test_a_verdict_that_nobody_waits_for_any_more(device: Device) -> None:
    device.verifier.check("gone", (Target(ONE.target_path, SIGNED),))
    assert device.turn(lambda: device.asked)
    device.verifier.cancel("gone")
    assert device.turn(lambda: device.process() is None)
    assert not device.answers


def test_away_from_its_broker_a_device_needs_a_root_of_its_own(tmp_path: Path, repository: TufRepository) -> None:
    elsewhere = Device(tmp_path / "one", repository, broker="mqtts://broker.example:8883")
    elsewhere.verifier.check("d", (Target(ONE.target_path, SIGNED),))
    assert elsewhere.turn(lambda: elsewhere.answers)
    assert elsewhere.answers == {"d": WireErrorCode.NO_TRUSTED_ROOT}
    (tmp_path / "root.json").write_bytes(repository.files["1.root.json"])
    told = Device(
        tmp_path / "two", repository, broker="mqtts://broker.example:8883", root_file=str(tmp_path / "root.json")
    )
    told.verifier.check("d", (Target(ONE.target_path, SIGNED),))
    assert told.turn(lambda: told.answers)
    assert told.answers == {"d": None}
    for one in (elsewhere, told):
        one.verifier.stop()
