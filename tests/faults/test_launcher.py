"""The launcher, killed and without power at every dealing with its disk; in a process of its own, for it forks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def faults(every: int, code: str = "") -> tuple[int, dict[str, int], str]:
    program = f"{code}\nimport sys\nfrom tests.faults.launcher import main\nsys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, str(every)], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


@pytest.mark.parametrize(("every", "least"), [(9, 30), pytest.param(1, 300, marks=pytest.mark.slow)])
def test_a_release_is_tried_and_taken_back_whenever_the_device_ends(every: int, least: int) -> None:
    status, summary, text = faults(every)
    assert status == 0, text
    assert summary["lost"] == 0
    assert summary["tried"] > least


def test_a_launcher_that_brings_no_journal_back_is_found() -> None:
    broken = """
from agent.release_trial import Trials
Trials._restore = lambda self: None
"""
    status, summary, text = faults(20, broken)
    assert status == 1, text
    assert summary["lost"] > 0
