"""`python -m tests.faults`: puts devices through faults and prints what came of it; `make faults` is its long form.

Rows whose faults need a small disk run in a mount namespace of their own, where the machine allows one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--cases", type=int, default=0, help="at most so many of each row, spread over it; 0 for all")
    parser.add_argument("--seed", type=int, default=1, help="of what is decided by chance")
    parser.add_argument("--row", action="append", help="only this row")
    parser.add_argument("--whole", action="store_true", help="the rows with a real server, broker and agent too")
    parser.add_argument("--until-lost", action="store_true", help="stop a row at the first case that is lost")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    from tests.faults.scenarios import NEED_MOUNT

    names = options.row or list(_rows(whole=options.whole))
    plain = [name for name in names if name not in NEED_MOUNT or options.inside]
    rows = [_row(name, options) for name in plain]
    rows += [_in_namespace(name, options) for name in names if name not in plain]
    if options.inside:
        print(json.dumps(rows))
        return 0
    return _print(rows)


def _row(name: str, options: argparse.Namespace) -> dict[str, object]:
    started = time.monotonic()
    cases = list(_rows(whole=True)[name](options.seed))
    if options.cases and len(cases) > options.cases:
        cases = [cases[index * len(cases) // options.cases] for index in range(options.cases)]
    lost: list[str] = []
    for what, case in cases:
        wrong = case()
        if wrong:
            lost.append(f"{what}: {wrong}")
            print(f"LOST {name}: {lost[-1]}", file=sys.stderr, flush=True)
            if options.until_lost:
                break
    seconds = round(time.monotonic() - started, 1)
    print(f"{name}: {len(cases)} tried, {len(lost)} lost, {seconds} s", file=sys.stderr, flush=True)
    return {"fault": name, "tried": len(cases), "lost": lost, "seconds": seconds}


def _rows(*, whole: bool) -> dict[str, Callable[[int], Iterator[tuple[str, Callable[[], str | None]]]]]:
    from tests.faults.scenarios import SCENARIOS

    if not whole:
        return SCENARIOS
    from tests.faults import killed_engine, whole_fleet  # they import what the server is made of

    return SCENARIOS | killed_engine.ROWS | whole_fleet.ROWS


def _in_namespace(name: str, options: argparse.Namespace) -> dict[str, object]:
    arguments = ["--inside", "--row", name, "--cases", str(options.cases), "--seed", str(options.seed)]
    prefix = ["unshare", "--mount"] if os.geteuid() == 0 else NAMESPACE
    try:
        done = subprocess.run(
            [*prefix, sys.executable, "-m", "tests.faults", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        return {"fault": name, "tried": 0, "lost": [], "seconds": 0.0, "skipped": f"no small disk here: {error}"}
    row: dict[str, object] = json.loads(done.stdout)[0]
    return row


def _print(rows: list[dict[str, object]]) -> int:
    wide = max([20, *(len(str(row["fault"])) for row in rows)])
    print(f"{'fault':<{wide}} {'points tried':>12} {'recovered':>10} {'lost':>5} {'s':>7}")
    total = lost_in_all = 0
    for row in rows:
        tried, lost = int(str(row["tried"])), len(row["lost"])  # type: ignore[arg-type]
        total, lost_in_all = total + tried, lost_in_all + lost
        note = f"  skipped: {row['skipped']}" if "skipped" in row else ""
        print(f"{row['fault']!s:<{wide}} {tried:>12} {tried - lost:>10} {lost:>5} {row['seconds']!s:>7}{note}")
    print(f"{'all':<{wide}} {total:>12} {total - lost_in_all:>10} {lost_in_all:>5}")
    print(json.dumps({"tried": total, "lost": lost_in_all, "skipped": [r["fault"] for r in rows if "skipped" in r]}))
    return 1 if lost_in_all else 0


if __name__ == "__main__":
    sys.exit(main())
