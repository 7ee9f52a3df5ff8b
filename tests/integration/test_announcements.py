"""What rollouts and deployments tell of themselves, as rows, on SQLite and PostgreSQL."""

from __future__ import annotations

import json

import pytest
from sqlalchemy import select

from agent.protocol.lifecycle import Phase
from fleet_server.db import Database
from fleet_server.models import Webhook, WebhookDelivery
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.rollouts import service
from fleet_server.rollouts.schemas import RolloutCreate
from tests.integration.test_rollout_rules import SETTINGS, World


def test_a_rollout_and_its_deployments_tell_of_themselves(database: Database) -> None:
    """Rows alone: one device takes the version, one fails, and the rollout is judged."""
    with database.write() as session:
        session.add(
            Webhook(
                fleet_id=DEFAULT_FLEET, url="http://127.0.0.1:9/", types=["shoal.*"], secret="whsec_", created_by=""
            )
        )
    world = World(database)
    strategy = {"stages": [{"percent": 50}, {"percent": 100}], "stop_when": []}
    rollout = world.create("1", target={"devices": ["a", "b"]}, strategy=strategy)
    first = next(one for one in "ab" if world.desired(one))
    for phase in (Phase.DOWNLOADING, Phase.ACTIVE):
        world.goes(first, phase)
    world.goes(first, Phase.ACTIVE)
    world.tick(rollout)
    world.goes("b" if first == "a" else "a", Phase.FAILED)
    world.tick(rollout)
    with database.read() as session:
        rows = session.scalars(select(WebhookDelivery).order_by(WebhookDelivery.id)).all()
        told = [json.loads(row.body) for row in rows]
    assert [one["type"].removeprefix("shoal.") for one in told][:6] == [
        "rollout.created",
        "rollout.started",
        "deployment.active",
        "rollout.stage_advanced",
        "deployment.failed",
        "rollout.succeeded",
    ]
    failed = told[4]["data"]
    assert (failed["phase"], failed["before"]) == ("failed", "pending")
    assert failed["failure"]["code"] == "load_failed"
    assert failed["device_id"] != first
    assert told[2]["data"]["version"] == "1"
    assert told[0]["subject"] == f"rollout/{rollout}"


def test_a_change_that_is_rolled_back_tells_nothing(database: Database) -> None:
    with database.write() as session:
        session.add(Webhook(fleet_id=DEFAULT_FLEET, url="http://127.0.0.1:9/", types=["*"], secret="", created_by=""))
    world = World(database)

    class UndoneError(Exception):
        pass

    wanted = RolloutCreate.model_validate({"version": "m@1", "target": {"all": True}, "allow_unproven": True})

    def undone() -> None:
        with database.write() as session:
            service.create(session, SETTINGS, DEFAULT_FLEET, wanted, actor="test")
            raise UndoneError

    with pytest.raises(UndoneError):
        undone()
    assert world.messages("a") == []
    with database.read() as session:
        assert session.scalars(select(WebhookDelivery)).all() == []
