"""Two-person approval: what waits sends nothing, and only others let it start. On SQLite and PostgreSQL."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fleet_server.db import Database
from fleet_server.errors import ConflictError, ForbiddenError
from fleet_server.models import AuditEvent, Fleet, Rollout, Variant
from fleet_server.principals import DEFAULT_FLEET, Actor
from fleet_server.rollouts import approvals, service, views
from fleet_server.rollouts.schemas import RolloutCreate, RolloutDecision, RolloutView
from tests.integration.test_rollout_rules import SETTINGS, World

ADA, BOB, EVE = (Actor(f"user/{name}", f"user/{number}") for number, name in enumerate(("ada", "bob", "eve")))


class Guarded(World):
    """A fleet that asks for approvals."""

    def __init__(self, database: Database, needed: int) -> None:
        super().__init__(database)
        with database.write() as session:
            session.get_one(Fleet, DEFAULT_FLEET).approvals = needed

    def create_by(self, actor: Actor, version: str, **fields: Any) -> str:
        wanted = RolloutCreate.model_validate(
            {"version": f"m@{version}", "target": {"all": True}, "allow_unproven": True,
             "strategy": {"stages": [{"percent": 100}]}, **fields}
        )  # fmt: skip
        with self.database.write() as session:
            return service.create(session, SETTINGS, DEFAULT_FLEET, wanted, actor=actor).id

    def approve(self, actor: Actor, rollout: str, comment: str = "") -> RolloutView:
        with self.database.write() as session:
            found = service.get_rollout(session, DEFAULT_FLEET, rollout, lock=True)
            approvals.approve(session, SETTINGS, found, RolloutDecision(comment=comment), actor=actor)
            return views.rollout_view(session, found)

    def sent(self) -> list[dict[str, str]]:
        return [self.desired(device) for device in "abcd" if self.desired(device)]


def test_it_waits_for_as_many_others_as_the_fleet_asks_for(database: Database) -> None:
    world = Guarded(database, 2)
    rollout = world.create_by(ADA, "1")
    waiting = world.tick(rollout)
    assert (waiting.state, waiting.created_by, waiting.approvals_needed) == ("awaiting_approval", "user/ada", 2)
    assert world.sent() == []
    with pytest.raises(ForbiddenError, match="who created a rollout"):
        world.approve(ADA, rollout)
    assert world.approve(BOB, rollout, "looks right").state == "awaiting_approval"
    with pytest.raises(ForbiddenError, match="approved it already"):
        world.approve(BOB, rollout)
    assert world.sent() == []
    started = world.approve(EVE, rollout)
    assert started.state == "running"
    assert [one.by for one in started.approvals] == ["user/bob", "user/eve"]
    assert [one.decision for one in started.verdicts] == ["wait", "approve", "approve", "start"]
    assert len(world.sent()) == 4
    with pytest.raises(ConflictError, match="waits for no approval"):
        world.approve(Actor("user/max", "user/9"), rollout)
    with database.read() as session:
        events = session.query(AuditEvent).filter(AuditEvent.action.like("rollout.%")).order_by(AuditEvent.id).all()
    assert [(one.actor, one.action) for one in events] == [
        ("user/ada", "rollout.create"),
        ("user/bob", "rollout.approve"),
        ("user/eve", "rollout.approve"),
    ]


def test_there_is_no_way_round(database: Database) -> None:
    world = Guarded(database, 1)
    rollout = world.create_by(ADA, "1")
    with database.write() as session:
        found = session.get_one(Rollout, rollout)
        with pytest.raises(ConflictError, match="waits for approvals"):
            service.resume(session, SETTINGS, found, actor=ADA)
        for step in (
            lambda: service.pause(session, found, "", actor=ADA),
            lambda: service.abort(session, SETTINGS, found, revert=True, actor=ADA),
        ):
            with pytest.raises(ConflictError):
                step()
        session.get_one(Fleet, DEFAULT_FLEET).approvals = 0
    assert world.tick(rollout).state == "awaiting_approval", "it keeps what it was created with"
    assert world.sent() == []


def test_reject_and_abort_end_it(database: Database) -> None:
    world = Guarded(database, 1)
    for end in ("reject", "abort"):
        rollout = world.create_by(ADA, "1")
        with database.write() as session:
            found = session.get_one(Rollout, rollout)
            if end == "reject":
                approvals.reject(session, found, RolloutDecision(comment="too late today"), actor=BOB)
            else:
                service.abort(session, SETTINGS, found, revert=False, actor=ADA)
        ended = world.view(rollout)
        assert (ended.state, ended.verdicts[-1].decision) == ("stopped", end)
        with pytest.raises(ConflictError):
            world.approve(EVE, rollout)
    assert world.sent() == []


def test_what_starts_is_what_was_approved(database: Database) -> None:
    world = Guarded(database, 1)
    rollout = world.create_by(ADA, "1")
    with database.write() as session:
        variant = session.query(Variant).filter_by(digest="1" * 64).one()
        variant.digest = "9" * 64
    with pytest.raises(ConflictError, match="was not approved"):
        world.approve(BOB, rollout)
    assert world.view(rollout).approvals == [], "an approval that starts nothing does not count"
    with database.write() as session:
        session.get_one(Variant, variant.id).digest = "1" * 64
    assert world.approve(BOB, rollout).state == "running"


def test_one_that_waits_ends_no_other_before_it_starts(database: Database) -> None:
    world = Guarded(database, 0)
    first = world.create_by(ADA, "1")
    with database.write() as session:
        session.get_one(Fleet, DEFAULT_FLEET).approvals = 1
    second = world.create_by(ADA, "2", on_busy="supersede")
    assert {version for sent in world.sent() for version in sent.values()} == {"1"}
    assert world.view(first).counts.superseded == 0
    world.approve(BOB, second)
    assert {version for sent in world.sent() for version in sent.values()} == {"2"}
    assert world.view(first).counts.superseded == 4


def test_two_that_approve_at_once_start_it_once(database: Database) -> None:
    world = Guarded(database, 2)
    rollout = world.create_by(ADA, "1")
    with ThreadPoolExecutor(2) as pool:
        views = list(pool.map(lambda actor: world.approve(actor, rollout), (BOB, EVE)))
    assert sorted(view.state for view in views) == ["awaiting_approval", "running"]
    assert len(world.view(rollout).approvals) == 2
    assert world.view(rollout).counts.total == 4
