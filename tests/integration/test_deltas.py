"""Which encodings are made, offered and served, and how long a stage waits for them; on both databases."""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest
from sqlalchemy import select

from agent.protocol.codec import decode
from agent.protocol.delta import DELTA
from agent.protocol.lifecycle import Phase
from agent.protocol.limits import LIMITS
from agent.protocol.manifest import Encoding, Manifest
from agent.protocol.messages import DeploymentReport, DesiredState
from agent.protocol.topics import DeviceTopic, device_topic
from fleet_server import outbox
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.deltas import service
from fleet_server.deltas.maker import DeltaMaker
from fleet_server.deltas.repository import MOST_BASES
from fleet_server.models import ArtifactEncoding, Deployment, Device, DeviceHolding, Rollout, Variant
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.rollouts.engine import advance
from tests.databases import short_on_sqlite
from tests.delta_files import decoded
from tests.fleet import wait_until
from tests.integration.test_rollout_rules import SETTINGS, World
from tests.processes import descendants

ALL = {"stages": [{"percent": 100}]}


@dataclasses.dataclass
class Deltas:
    """Versions 1 to 3 of a model as files that differ a little, and four devices; a maker that runs when it is told."""

    world: World
    database: Database
    artifacts: ArtifactStore
    maker: DeltaMaker
    content: dict[str, bytes]
    digest: dict[str, str]

    def held(self, device: str, *versions: str) -> None:
        with self.database.write() as session:
            found = session.get_one(Device, device)
            for version in versions:
                session.add(DeviceHolding(device_id=found.id, digest=self.digest[version], fleet_id=found.fleet_id))

    def encodings(self, device: str) -> tuple[Encoding, ...]:
        """As the newest message for a device offers them; none when there is none."""
        topic = device_topic(device, DeviceTopic.DESIRED)
        with self.database.read() as session:
            messages = [one for one in outbox.pending(session, limit=1000) if one.topic == topic]
        state = decode(messages[-1].payload, DesiredState)
        return state.deployments[0].encodings

    def phase(self, rollout: str, device: str) -> str:
        with self.database.read() as session:
            query = select(Deployment.phase).where(Deployment.rollout_id == rollout, Deployment.device_id == device)
            return session.scalars(query).one()

    def rows(self) -> dict[tuple[str, str], ArtifactEncoding]:
        names = {digest: version for version, digest in self.digest.items()} | {"": ""}
        with self.database.read() as session:
            return {(names[row.artifact], names[row.base]): row for row in session.scalars(select(ArtifactEncoding))}

    def begun(self, rollout: str, at: dt.datetime) -> None:
        """Let its stage have begun at another time."""
        with self.database.write() as session:
            session.get_one(Rollout, rollout).stage_started_at = at

    def told(self, rollout: str) -> list[str]:
        """What is said of devices that wait for differences."""
        with self.database.read() as session:
            verdicts = session.get_one(Rollout, rollout).verdicts
        return [one["reason"] for one in verdicts if one["decision"] == "prepare"]

    def tick(self, rollout: str) -> None:
        with self.database.write() as session:
            advance(session, SETTINGS, session.get_one(Rollout, rollout))

    def make_all(self) -> None:
        for _ in range(20):
            with self.database.read() as session:
                if not service.wanted(session):
                    return
            self.maker.tick()
        raise AssertionError("the maker never ends")


@pytest.fixture
def deltas(database: Database, tmp_path: Path) -> Deltas:
    world = World(database)
    artifacts = ArtifactStore.open(None, folder=tmp_path / "artifacts")
    rng = np.random.default_rng(0)
    content, digest = {}, {}
    weights = rng.integers(-127, 127, 200_000).astype(np.int8)
    with database.write() as session:
        for variant in session.scalars(select(Variant)):
            manifest = msgspec.convert(variant.manifest, Manifest)
            path = tmp_path / manifest.version
            path.write_bytes(weights.tobytes())
            content[manifest.version] = weights.tobytes()
            found, size = artifacts.put_file(path)
            digest[manifest.version] = found
            manifest = msgspec.structs.replace(manifest, digest=found, size=size, chunk_size=LIMITS.chunk_bytes)
            variant.digest, variant.size, variant.manifest = found, size, msgspec.to_builtins(manifest)
            weights = np.where(rng.random(len(weights)) < 0.01, weights + 1, weights).astype(np.int8)
    settings = SETTINGS.model_copy(update={"state_dir": tmp_path})
    return Deltas(world, database, artifacts, DeltaMaker(database, artifacts, settings), content, digest)


def test_a_stage_waits_for_a_difference_and_sends_it(deltas: Deltas) -> None:
    deltas.held("a", "1")
    rollout = deltas.world.create("2", strategy=ALL)
    assert deltas.phase(rollout, "a") == "scheduled"
    assert deltas.phase(rollout, "b") == "pending"  # it holds nothing: there is nothing to wait for
    deltas.begun(rollout, utc_now() + dt.timedelta(minutes=1))  # a machine that runs tests may be slow
    deltas.tick(rollout)
    assert deltas.phase(rollout, "a") == "scheduled"
    assert deltas.told(rollout) == []
    deltas.begun(rollout, utc_now() - dt.timedelta(seconds=6))
    for _ in range(2):
        deltas.tick(rollout)
    assert deltas.told(rollout) == ["1 devices wait, 300 s at most, for a difference to what they hold"]
    deltas.make_all()
    deltas.tick(rollout)
    assert deltas.phase(rollout, "a") == "pending"
    (difference,) = deltas.encodings("a")  # noise does not compress: there is no full encoding worth it
    assert (difference.codec, difference.base) == (DELTA, deltas.digest["1"])
    assert difference.size < 0.03 * len(deltas.content["2"])
    sent = deltas.artifacts.read_range(difference.digest, 0, difference.size + 1)
    assert decoded(DELTA, sent, deltas.content["1"], len(deltas.content["2"])) == deltas.content["2"]
    assert deltas.rows()["2", ""].digest == ""
    assert "not worth" in deltas.rows()["2", ""].detail
    with deltas.database.read() as session:
        entitled = service.entitled(session, "a", difference.digest)
        assert entitled is not None
        assert (entitled.digest, entitled.size) == (difference.digest, difference.size)
        assert service.entitled(session, "c", "f" * 64) is None


@short_on_sqlite("database")
def test_a_difference_puts_off_what_no_stage_waits_for(deltas: Deltas, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(np.random.default_rng(1).integers(0, 64, 64 << 20).astype(np.uint8).tobytes())
    digest, size = deltas.artifacts.put_file(large)
    with deltas.database.write() as session:
        variant = session.scalars(select(Variant).where(Variant.digest == deltas.digest["2"])).one()
        variant.digest, variant.size = digest, size
    deltas.world.create("2", strategy=ALL)
    whole = threading.Thread(target=deltas.maker.tick)
    whole.start()
    try:
        wait_until("its process", lambda: descendants(os.getpid(), "fleet_server.deltas.process"))
        deltas.held("a", "1")
    finally:
        whole.join()
    assert deltas.rows() == {}, "nobody waits for the whole one, and it takes some twenty seconds"
    with deltas.database.read() as session:
        assert [one.base for one in service.wanted(session)] == [deltas.digest["1"], ""]


@short_on_sqlite("database")
def test_a_stage_does_not_wait_for_ever(deltas: Deltas) -> None:
    deltas.held("a", "1")
    rollout = deltas.world.create("2", strategy=ALL)
    with deltas.database.write() as session:
        session.get_one(Rollout, rollout).stage_started_at = utc_now() - dt.timedelta(seconds=301)
    deltas.tick(rollout)
    assert deltas.phase(rollout, "a") == "pending"
    assert deltas.encodings("a") == ()


@short_on_sqlite("database")
def test_a_rollout_does_not_succeed_while_a_device_waits(deltas: Deltas) -> None:
    deltas.held("a", "1")
    rollout = deltas.world.create("2", strategy=ALL)
    for device in "bcd":
        with deltas.database.read() as session:
            query = select(Deployment.id).where(Deployment.device_id == device, Deployment.rollout_id == rollout)
            key = session.scalars(query).one()
        deltas.world.report(
            device, DeploymentReport(key, "m", "2", deltas.digest["2"], Phase.ACTIVE, 200_000, encoding="")
        )
    deltas.tick(rollout)
    with deltas.database.read() as session:
        assert session.get_one(Rollout, rollout).state == "running"


@short_on_sqlite("database")
def test_nothing_waits_where_differences_are_switched_off(deltas: Deltas) -> None:
    deltas.held("a", "1")
    with deltas.database.read() as session:
        off = SETTINGS.model_copy(update={"deltas": False})
        assert service.awaiting(session, off, "any", 0) == set()


def test_each_device_is_offered_what_builds_on_what_it_holds(deltas: Deltas) -> None:
    deltas.held("a", "1")
    deltas.held("b", "2")
    deltas.held("c", "1", "2")
    rollout = deltas.world.create("3", strategy=ALL)
    deltas.make_all()
    deltas.tick(rollout)
    one, two = deltas.digest["1"], deltas.digest["2"]
    assert [encoding.base for encoding in deltas.encodings("a")] == [one]
    assert [encoding.base for encoding in deltas.encodings("b")] == [two]
    assert {encoding.base for encoding in deltas.encodings("c")} == {two, one}
    assert deltas.encodings("d") == ()


def test_what_devices_say_they_hold_makes_only_so_much_work(deltas: Deltas) -> None:
    deltas.held("a", "1")
    rollout = deltas.world.create("2", strategy=ALL)
    with deltas.database.write() as session:
        for number in range(MOST_BASES):
            pair = service.Pair(DEFAULT_FLEET, deltas.digest["2"], f"{number:064x}")
            service.record(session, pair, detail="made before")
    with deltas.database.read() as session:
        assert [pair.base for pair in service.wanted(session)] == [""]
    deltas.tick(rollout)
    assert deltas.phase(rollout, "a") == "pending"


@short_on_sqlite("database")
def test_one_that_can_not_be_made_is_tried_once(deltas: Deltas) -> None:
    deltas.held("a", "1")
    deltas.artifacts.delete(deltas.digest["1"])
    rollout = deltas.world.create("2", strategy=ALL)
    deltas.make_all()
    assert (deltas.rows()["2", "1"].digest, deltas.rows()["2", "1"].codec) == ("", "")
    deltas.tick(rollout)
    assert deltas.phase(rollout, "a") == "pending"


def test_what_a_device_says_it_holds_is_kept_as_it_says(deltas: Deltas) -> None:
    def known() -> set[str]:
        with deltas.database.read() as session:
            return set(session.scalars(select(DeviceHolding.digest).where(DeviceHolding.device_id == "a")))

    for held in ({"a" * 64, "b" * 64}, {"b" * 64, "c" * 64}, set()):
        deltas.world.report("a", held=tuple(sorted(held)))
        assert known() == held


@short_on_sqlite("database")
def test_encodings_go_with_the_versions_they_are_of(deltas: Deltas) -> None:
    deltas.held("a", "1")
    deltas.world.create("2", strategy=ALL)
    deltas.make_all()
    digest = deltas.rows()["2", "1"].digest
    assert deltas.artifacts.exists(digest)
    with deltas.database.write() as session:
        for variant in session.scalars(select(Variant).where(Variant.digest == deltas.digest["1"])):
            variant.digest = "9" * 64
    deltas.maker._sweep()
    assert set(deltas.rows()) == {("2", "")}
    assert not deltas.artifacts.exists(digest)


def test_another_fleets_encodings_are_not_offered(deltas: Deltas) -> None:
    with deltas.database.write() as session:
        service.record(session, service.Pair(DEFAULT_FLEET, "a" * 64, ""), codec="zstd", digest="b" * 64, size=9)
    with deltas.database.read() as session:
        assert len(service.Offers(session, DEFAULT_FLEET, ["a" * 64], ["a"]).of("a" * 64, "a")) == 1
        assert service.Offers(session, "another", ["a" * 64], ["a"]).of("a" * 64, "a") == ()
