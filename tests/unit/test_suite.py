"""How the suite runs what failed once more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ONCE = """
from pathlib import Path

def test_holds():
    seen = Path(__file__).with_suffix(".seen")
    was_there = seen.exists()
    seen.touch()
    assert was_there or {always}
"""


def suite(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, str(ROOT / "tests" / "suite.py"), "--beside=0", *arguments, "--", "-q", "-p", "xdist"]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # some take seconds
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def test_what_fails_beside_others_and_holds_alone_is_named(tmp_path: Path) -> None:
    (tmp_path / "test_once.py").write_text(ONCE.format(always=False))
    (tmp_path / "test_well.py").write_text(ONCE.format(always=True))
    done = suite(tmp_path)
    assert done.returncode == 0, done.stdout
    assert "HELD ALONE, AND NOT BESIDE OTHERS: test_once.py" in done.stderr
    assert "1 failed, 1 passed" in done.stdout
    assert suite(tmp_path).stderr == "", "nothing failed"


def test_what_fails_twice_fails_the_suite(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text("def test_broken():\n    assert False\n")
    done = suite(tmp_path)
    assert done.returncode == 1
    assert "HELD" not in done.stderr


@pytest.mark.parametrize("broken", ["def test_one():\n    assert False\n", "import nothing_of_that_name\n"])
def test_nothing_is_run_again_where_more_than_a_few_fail_or_more_is_wrong(tmp_path: Path, broken: str) -> None:
    for number in range(3):
        (tmp_path / f"test_{number}.py").write_text(broken)
    done = suite(tmp_path, "--few=2")
    assert done.returncode != 0
    assert "run again" not in done.stderr
