"""What a release is made of: the files that git tracks, as they are now, and one date for all of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def epoch() -> int:
    """SOURCE_DATE_EPOCH, else the time of the last commit: seconds since 1970 that stand in all that is built."""
    told = os.environ.get("SOURCE_DATE_EPOCH")
    return int(told or _git("log", "-1", "--format=%ct"))


def copy_tracked(target: Path) -> None:
    """Copy what git tracks, with changes that are not committed; not what builds or tests left."""
    for name in _git("ls-files", "-z").split("\0"):
        source = ROOT / name
        if name and source.is_file():
            copy = target / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
            copy.chmod(0o755 if os.access(source, os.X_OK) else 0o644)


def version() -> str:
    """Of the distribution, as pyproject.toml has it."""
    found = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def debian_version() -> str:
    """The same as Debian sorts it: `1.0.0rc1` comes before `1.0.0`."""
    return re.sub(r"(?<=\d)\.?(a|b|rc|dev)(?=\d)", r"~\1", version())


def changes(of: str) -> str:
    """The section of CHANGELOG.md about a version.

    Raises:
        LookupError: when there is none.
    """
    text = (ROOT / "CHANGELOG.md").read_text()
    found = re.search(rf"^## {re.escape(of)}\b.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise LookupError(f"CHANGELOG.md says nothing of {of}: add a section `## {of}`")
    return found[0].rstrip() + "\n"


def settle(folder: Path, moment: int) -> None:
    """Give everything in a folder one time, and modes that do not depend on who builds."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if not path.is_symlink():
            executable = path.is_dir() or os.access(path, os.X_OK)
            private = path.stat().st_mode & 0o007 == 0
            path.chmod((0o750 if private else 0o755) if executable else (0o640 if private else 0o644))
        os.utime(path, (moment, moment), follow_symlinks=False)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
