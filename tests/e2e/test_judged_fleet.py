"""Two hundred simulated devices: what is bad is stopped by its own rule and taken back, what is good goes through."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)
def test_every_rollout_of_a_simulated_fleet_ends_as_it_should() -> None:
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / "rollouts.py"), "--short"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=880, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["checks"]) >= 16
    assert [one["name"] for one in result["checks"] if not one["holds"]] == [], done.stderr[-3000:]
