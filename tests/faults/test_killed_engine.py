"""A spread of the server's deaths in rollouts; in a process of its own, for it forks, and a test runner has threads."""

from __future__ import annotations

import pytest

from tests.faults.killed_engine import ROWS
from tests.faults.test_every_point import faults

# An engine that forgets: it marks what failed as tried again in one transaction, and tries it again in another.
BROKEN = """
from contextlib import suppress
from sqlalchemy import select
from fleet_server.models import Deployment, Rollout
from fleet_server.rollouts import repository, service
from fleet_server.rollouts.engine import RolloutEngine
tick, marked = RolloutEngine.tick, []
def torn(self):
    with self._database.write() as session:
        for rollout in session.scalars(select(Rollout).where(Rollout.state == "running")):
            for one in repository.failed(session, rollout.id, alone=True):
                if one.attempt < 2:
                    one.replaced = True
                    marked.append(one.id)
    with self._database.write() as session:
        while marked:
            one = session.get_one(Deployment, marked.pop())
            service.try_again(session, session.get_one(Rollout, one.rollout_id), one)
    tick(self)
RolloutEngine.tick = torn
"""


def named(rows: list[str]) -> list[str]:
    return [part for row in rows for part in ("--row", row)]


# What each database makes of a kill, and who decides: nobody, a stop rule, or a person.
SOME = [
    row
    for row in ROWS
    if "tried again" in row or ("SQLite" in row and row.endswith(("a version that does not load", "that reverts")))
]
LONG = pytest.param(list(ROWS), "0", marks=[pytest.mark.slow, pytest.mark.timeout(3600)], id="all")


@pytest.mark.parametrize(("rows", "cases"), [pytest.param(SOME, "2", id="some"), LONG])
def test_a_rollout_ends_as_if_its_server_had_never_died(rows: list[str], cases: str) -> None:
    status, summary, text = faults(*named(rows), "--cases", cases, timeout_s=None)
    assert status == 0, text
    assert (summary["lost"], summary["tried"] >= 2 * len(rows) - 2) == (0, True)


def test_the_harness_finds_an_engine_that_is_broken() -> None:
    row = "server killed, SQLite: failures that are tried again"
    status, summary, text = faults(*named([row]), "--until-lost", code=BROKEN)
    assert (status, summary["lost"]) == (1, 1), text
