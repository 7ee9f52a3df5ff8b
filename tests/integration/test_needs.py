"""What many devices lack at once: who may have it is sent it, and the database is asked once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from sqlalchemy import event

from agent.protocol.messages import ChunkRange, Need
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.gateway.delivery import Delivery
from fleet_server.gateway.needs import Needs
from fleet_server.models import Deployment, DeviceIdentity, Profile, Rollout, Variant, Version
from fleet_server.principals import DEFAULT_FLEET
from tests.fabricated import CHUNK, fabricate
from tests.integration.test_database_rules import register

DEVICES = 40
IDS = [f"dev-{number:02}" for number in range(DEVICES)]


class World:
    """Devices that ought to run a version of two chunks, a delivery, and what it sent."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database = database
        artifacts = ArtifactStore.open(None, folder=folder)
        with database.write() as session:
            session.add(Profile(fleet_id=DEFAULT_FLEET, name="p", spec={"runtime": "onnx"}))
        fabricate(database, artifacts, folder, "m", "1", size=2 * CHUNK)
        for device_id in IDS:
            register(database, device_id)
        with database.write() as session:
            variant, version = session.query(Variant).one(), session.query(Version).one()
            self.digest = str(variant.digest)
            rollout = Rollout(
                fleet_id=DEFAULT_FLEET, name="r", version_id=version.id, state="running", target={}, strategy={}
            )
            session.add(rollout)
            session.flush()
            session.add_all(
                Deployment(
                    fleet_id=DEFAULT_FLEET, rollout_id=rollout.id, device_id=device_id, model_id=version.model_id,
                    version_id=version.id, variant_id=variant.id, desired=True, phase="downloading", stage=0,
                )
                for device_id in IDS
            )  # fmt: skip
        self.sent: list[str] = []
        self.delivery = Delivery(artifacts, lambda topic, _: bool(self.sent.append(topic)), None)
        self.needs = Needs(database, self.delivery, lambda digest: digest != "elsewhere")
        self.asked = 0

    def take(self, device_ids: Sequence[str], digest: str = "") -> None:
        """They lack all of it; `asked` is what the database was asked then."""
        need = Need(digest or self.digest, "d", (ChunkRange(0, 1),))

        def note(*_: object) -> None:
            self.asked += 1

        self.asked = 0
        event.listen(self.database.engine, "before_cursor_execute", note)
        self.needs.take([(device_id, need) for device_id in device_ids])
        event.remove(self.database.engine, "before_cursor_execute", note)


@pytest.fixture
def world(database: Database, tmp_path: Path) -> World:
    return World(database, tmp_path)


def waited_for(world: World) -> bool:
    return not world.delivery._streamer.idle


def test_many_cost_the_database_what_one_does(world: World) -> None:
    world.take(IDS[:1])
    alone = world.asked
    assert alone > 0
    world.take(IDS[1:])
    assert world.asked == alone
    world.take(IDS * 3)
    assert world.asked == 0, "it was seen a moment ago"
    assert waited_for(world)


def test_nobody_is_sent_what_is_not_theirs(world: World) -> None:
    with world.database.write() as session:
        session.add(
            DeviceIdentity(device_id=IDS[0], fleet_id=DEFAULT_FLEET, created_by="x", revoked_at=utc_now()),
        )
    world.take(IDS[:1])
    world.take(["stranger"])
    world.take(IDS[1:], "b" * 64)
    assert not waited_for(world)
    world.take(IDS, "elsewhere")
    assert (world.asked, waited_for(world)) == (0, False), "another server sends that"
    world.take(IDS[:2])
    assert waited_for(world)
