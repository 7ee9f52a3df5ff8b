"""The launcher, killed and without power at every dealing with its disk; in a process of its own, for it forks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def faults(code: str = "") -> tuple[int, dict[str, int], str]:
    program = f"{code}\nimport sys\nfrom tests.faults.launcher import main\nsys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


def test_a_release_is_tried_and_taken_back_whenever_the_device_ends() -> None:
    status, summary, text = faults()
    assert status == 0, text
    assert summary["lost"] == 0
    assert summary["tried"] > 100


def test_a_launcher_that_brings_no_journal_back_is_found() -> None:
    broken = """
from agent.release_trial import Trials
Trials._restore = lambda self: None
"""
    status, summary, text = faults(broken)
    assert status == 1, text
    assert summary["lost"] > 0
