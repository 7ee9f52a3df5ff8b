"""Benchmarks run, and end in the JSON line that is promised. Their figures are nobody's to assert."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_serving_benchmark_ends_in_one_json_line() -> None:
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / "serving.py"), "--short"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["bench"] == "serving"
    assert len(result["checks"]) > 5
    for check in result["checks"]:
        assert set(check) == {"name", "value", "goal", "holds"}
        assert isinstance(check["holds"], bool)
