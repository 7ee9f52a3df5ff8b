"""Prometheus' own checker, where it is installed (Debian's package `prometheus` has it)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

FOUND = shutil.which("promtool")


def check_metrics(text: str) -> None:
    """Fails with what promtool finds fault with in the text of a scrape: its parser's errors, and its naming rules."""
    _run(["check", "metrics"], text)


def check_rules(path: Path) -> None:
    """Likewise in a file of rules."""
    _run(["check", "rules", str(path)])


def check_config(path: Path) -> None:
    """Likewise in a configuration, and in the files of rules that it names."""
    _run(["check", "config", str(path)])


def _run(arguments: list[str], text: str = "") -> None:
    assert FOUND is not None
    done = subprocess.run([FOUND, *arguments], input=text, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", done.stderr
