"""Benchmarks run, and end in the JSON line that is promised. Their figures are nobody's to assert."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NGINX = shutil.which("nginx", path=os.pathsep.join([*os.get_exec_path(), "/usr/sbin"]))
LONG = pytest.mark.slow  # each half a minute and more, even in its short form
WANTS_NGINX = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (apt-get install nginx-light)")


@pytest.mark.parametrize(
    "name",
    [
        "footprint",
        "ingest",
        "serving",
        pytest.param("delivery", marks=[LONG, WANTS_NGINX]),
        *(pytest.param(name, marks=LONG) for name in ("delta", "distributed", "queries", "swaps")),
    ],
)
def test_a_benchmark_ends_in_one_json_line(name: str) -> None:
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / f"{name}.py"), "--short"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["bench"] == name
    assert len(result["checks"]) > 5
    for check in result["checks"]:
        assert set(check) == {"name", "value", "goal", "holds"}
        assert isinstance(check["holds"], bool)
