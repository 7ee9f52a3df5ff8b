"""Samples of real spools through a real broker to a real server, while both are killed: each is stored exactly once."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import func, select

from fleet_server.db import Database
from fleet_server.models import HostWindowRow
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.telemetry import service
from tests.faults.telemetry_sender import requests_of
from tests.fleet import LocalFleet, wait_until

# Processes, devices of each, samples of each device, kills
SHORT = (2, 3, 240, 5)
LONG = (2, 10, 5000, 20)


class Senders:
    """The sending processes."""

    def __init__(self, fleet: LocalFleet, processes: int, devices: int, samples: int) -> None:
        self.total = processes * devices * samples
        self._folder = fleet.folder / "devices"
        self._folder.mkdir()
        broker = f"mqtt://127.0.0.1:{fleet.broker_port}"
        command = [sys.executable, "-m", "tests.faults.telemetry_sender", str(self._folder), broker]
        self._prefixes = [f"s{number}-" for number in range(processes)]
        self.processes = [subprocess.Popen([*command, prefix, str(devices), str(samples)]) for prefix in self._prefixes]

    def count(self, what: str) -> int:
        """How many samples they have `made`, or still have `kept`."""
        files = [self._folder / f"{prefix}.json" for prefix in self._prefixes]
        return sum(json.loads(one.read_text())[what] for one in files if one.exists())

    def done(self) -> bool:
        ended = [one.poll() for one in self.processes]
        assert not any(ended), f"a sender ended with {ended}"
        return all(one == 0 for one in ended)

    def stop(self) -> None:
        for one in self.processes:
            one.kill()
            one.wait()


@pytest.fixture
def fleet(database: Database, tmp_path: Path) -> Iterator[LocalFleet]:
    """A server on the database and a broker that forgets everything when it is killed."""
    folder = tmp_path / "fleet"
    folder.mkdir()
    fleet = LocalFleet(folder, external_broker=True)
    try:
        fleet.start_broker()
        serve(fleet, database)
        yield fleet
    finally:
        fleet.stop()


def serve(fleet: LocalFleet, database: Database) -> None:
    fleet.start_server(answers="/healthz", SHOAL_DATABASE_URL=database.url, SHOAL_CONVERSION_WORKERS="0")


def stored(database: Database) -> int:
    with database.read() as session:
        return session.scalar(select(func.count()).select_from(HostWindowRow)) or 0


@pytest.mark.parametrize(
    "size", [SHORT, pytest.param(LONG, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])], ids=["short", "long"]
)
def test_every_sample_is_stored_once_whatever_is_killed(
    fleet: LocalFleet, database: Database, size: tuple[int, int, int, int]
) -> None:
    *shape, kills = size
    samples = shape[2]
    chance = random.Random(samples)
    senders = Senders(fleet, *shape)
    try:
        for number in range(kills):
            # Each time when another part of the samples has come, or all that were made.
            goal = min(senders.total * (number + 1) // (kills + 1), senders.total)
            wait_until("samples", lambda goal=goal: stored(database) >= goal, 300)  # type: ignore[misc]
            if number % 2:
                fleet.kill("broker")
                made = senders.count("made")
                if chance.random() < 0.5:
                    fleet.kill("server")
                    serve(fleet, database)
                wait_until("new samples", lambda made=made: made < senders.count("made") or made == senders.total)  # type: ignore[misc]
                fleet.start_broker()
            else:
                fleet.kill("server")
                before = stored(database)
                kept = min(senders.count("kept") + 50, senders.total - before)
                # What is sent now is taken by the broker, and by nobody else.
                wait_until("samples nobody takes", lambda kept=kept: senders.count("kept") >= kept)  # type: ignore[misc]
                assert stored(database) == before
                serve(fleet, database)
        wait_until("the end", senders.done, 1200)
    finally:
        senders.stop()
    assert stored(database) == senders.total
    with database.read() as session:
        found = service.summarize(session, DEFAULT_FLEET)
    truth = sum(requests_of(sample) for sample in range(1, samples + 1))
    assert [one.requests for one in found] == [truth] * (shape[0] * shape[1])
