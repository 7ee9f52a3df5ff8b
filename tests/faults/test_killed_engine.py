"""A spread of the server's deaths in rollouts; in a process of its own, for it forks, and a test runner has threads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.killed_engine import ROWS

ROOT = Path(__file__).resolve().parents[2]
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


def faults(rows: list[str], *arguments: str, code: str = "") -> tuple[int, dict[str, int], str]:
    named = [part for row in rows for part in ("--row", row)]
    program = f"{code}\nimport sys\nfrom tests.faults.__main__ import main\nsys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, *named, *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


SOME = [row for row in ROWS if "SQLite" in row or "tried again" in row]
LONG = pytest.param(list(ROWS), "0", marks=[pytest.mark.slow, pytest.mark.timeout(3600)], id="all")


@pytest.mark.parametrize(("rows", "cases"), [pytest.param(SOME, "2", id="some"), LONG])
def test_a_rollout_ends_as_if_its_server_had_never_died(rows: list[str], cases: str) -> None:
    status, summary, text = faults(rows, "--cases", cases)
    assert status == 0, text
    assert (summary["lost"], summary["tried"] >= 2 * len(rows) - 2) == (0, True)


def test_the_harness_finds_an_engine_that_is_broken() -> None:
    row = "server killed, SQLite: failures that are tried again"
    status, summary, text = faults([row], "--until-lost", code=BROKEN)
    assert (status, summary["lost"]) == (1, 1), text
