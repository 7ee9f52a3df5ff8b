"""A spread of the faults of `make faults`; in a process of its own, for it forks, and a test runner has threads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = 9
CASES = 4  # of each
# What each breaks of the agent must be found by that row, or the harness looks at nothing.
BROKEN = {
    "damaged files": """
from agent.update.store import ArtifactStore
ArtifactStore.verify = lambda self, digest: self.path(digest).is_file()
""",
    "power cut": """
import agent.database
from agent.update.lastgood import LastGood
LastGood.update = lambda self, records: None
opened = agent.database._open
agent.database._open = lambda path, schema, synchronous, **options: opened(path, schema, "OFF", **options)
""",
    "killed": """
from agent.deployments import Deployments
carry_out = Deployments.carry_out
def first_done_then_written(self, effects):
    if self._updater.revision != self._written_revision:
        self._journal.keep_number("revision", self._updater.revision)
    carry_out(self, effects)
Deployments.carry_out = first_done_then_written
""",
}


def faults(*arguments: str, code: str = "", timeout_s: float | None = 280) -> tuple[int, dict[str, object], str]:
    program = f"{code}\nimport sys\nfrom tests.faults.__main__ import main\nsys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


def test_a_spread_of_every_row_is_lived_through() -> None:
    status, summary, text = faults("--cases", str(CASES))
    assert status == 0, text
    assert summary["lost"] == 0
    skipped = summary["skipped"]
    assert isinstance(skipped, list)
    assert summary["tried"] == CASES * (ROWS - len(skipped))


@pytest.mark.parametrize("row", BROKEN)
def test_the_harness_finds_an_agent_that_is_broken(row: str) -> None:
    code = f"import tests.faults.device\ntests.faults.device.SECONDS = 4.0\n{BROKEN[row]}"
    status, summary, text = faults("--row", row, "--cases", "60", "--until-lost", code=code)
    assert status == 1, text
    assert summary["lost"] == 1
