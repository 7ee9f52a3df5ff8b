"""Runs the suite, and what failed in it once more by itself: `python -m tests.suite [--few N] -- pytest's arguments`.

Thousands of tests wait for real brokers, servers, workers and browsers, several at a time, on machines that may have
other work. Files that failed there are run again with nothing beside them. What fails again fails the suite; what holds
alone is named at the end, for somebody to look at: it depends on how busy the machine is, and should not. Where more
than a few files fail it is not the machine, and nothing is run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

FEW = 3  # files
CACHE = Path(".pytest_cache")
LAST_FAILED = CACHE / "v" / "cache" / "lastfailed"  # where pytest writes which tests failed
FAILED = 1  # what pytest ends with when tests failed, and nothing else was wrong


def main() -> int:
    """The exit status of pytest: of the second run, where there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", type=int, default=FEW, help=f"run so many files again at most; default {FEW}")
    parser.add_argument("--beside", type=int, default=1, help="processes of the first run; default 1")
    parser.add_argument("arguments", nargs="*", help="for pytest, in both runs; after --")
    given = parser.parse_args()
    status = run([*given.arguments, f"--numprocesses={given.beside}"])
    failed = failed_files()
    if status != FAILED or not 0 < len(failed) <= given.few:
        return status
    tell(f"failed beside others, and run again alone: {', '.join(failed)}")
    status = run([*given.arguments, "--numprocesses=0", *failed])
    if status == 0:
        tell(f"HELD ALONE, AND NOT BESIDE OTHERS: {', '.join(failed)}: see above what failed")
    return status


def run(arguments: list[str]) -> int:
    """Pytest, with what failed before forgotten."""
    LAST_FAILED.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-o", f"cache_dir={CACHE}", *arguments]
    return subprocess.run(command, check=False).returncode


def failed_files() -> list[str]:
    """The files of tests that failed in the last run."""
    try:
        failed = json.loads(LAST_FAILED.read_text())
    except FileNotFoundError:
        return []
    return sorted({test.partition("::")[0] for test in failed})


def tell(text: str) -> None:
    """A line that is seen among thousands."""
    print(f"\n=== {text}\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
