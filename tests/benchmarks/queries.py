"""`make bench-queries`: what requests cost at the database, in fleets of 10,000 and 100,000 devices, on both databases.

Each question is asked of the API once, and what the driver got is carried out again and again by the driver alone: that
is the time at the database, rows fetched. The plan of every statement is kept beside it. Whole requests are timed in
this process by ASGI, without a socket; fleets of both sizes take turns there. Questions have their goal at 10,000.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
from sqlalchemy import text

from fleet_server import migrations
from fleet_server.db import Database
from tests.benchmarks.common import Checks
from tests.big_fleet import BigFleet, build
from tests.databases import postgresql, postgresql_programs
from tests.query_plans import Asked, Driver, read_whole
from tests.questions import questions

LISTED_MS = 100.0
OVERVIEW_MS = 300.0
GROWTH = 1.1  # of a list's processor time, with ten times the devices


@dataclass(frozen=True)
class Size:
    """How much is done."""

    fleets: tuple[int, ...]
    repeats: int
    rounds: int
    requests: int


LONG = Size((10_000, 100_000), 15, 7, 20)
SHORT = Size((200, 400), 2, 2, 3)


@dataclass(frozen=True)
class Standing:
    """A fleet in a database, and the API over it."""

    fleet: BigFleet
    asked: Asked
    driver: Driver


@contextmanager
def standing(url: str, devices: int) -> Iterator[Standing]:
    """A fleet of so many devices at an address; every device then is seen once more, as in a server that is at work."""
    migrations.upgrade(url)
    database = Database(url)
    started = time.monotonic()

    def told(what: str) -> None:
        print(f"     {devices} devices, {time.monotonic() - started:.0f} s: {what}", file=sys.stderr, flush=True)

    fleet = build(database, devices, told)
    with database.write() as session:
        session.execute(text("UPDATE devices SET last_seen_at = last_seen_at"))
    asked, driver = Asked(database, telemetry_hours_days=7), Driver(database)
    try:
        yield Standing(fleet, asked, driver)
    finally:
        driver.close()
        asked.close()
        database.dispose()


def measure(checks: Checks, name: str, one: Standing, size: Size, *, judged: bool) -> list[dict[str, Any]]:
    """Every question of one fleet: time at the database, and plans."""
    found = []
    for question in questions(one.fleet):
        statements = one.asked.statements(question.path)
        repeats = size.repeats if question.goal else 3
        times = [one.driver.run(statements) * 1000 for _ in range(repeats)]
        p50, p95 = (float(np.quantile(times, share)) for share in (0.5, 0.95))
        plans = [{"statement": it.text, "plan": one.driver.plan(it)} for it in statements]
        row = f"{name}, {one.fleet.devices}: {question.name}, ms at the database, p95"
        if judged and question.goal:
            checks.at_most(row, p95, LISTED_MS)
        else:
            checks.report(row, p95)
        whole = sorted({table for it in plans for table in read_whole(it["plan"])})
        if whole:
            print(f"     reads whole: {', '.join(whole)}", file=sys.stderr)
        found.append(
            {"question": question.name, "path": question.path, "p50_ms": p50, "p95_ms": p95, "whole": whole,
             "statements": plans}
        )  # fmt: skip
    return found


def whole_requests(checks: Checks, name: str, fleets: Sequence[Standing], size: Size) -> None:
    """The overview by the clock, and a list of devices by the processor, beside the driver; fleets take turns."""
    listed = "/devices?limit=50"
    overview: dict[int, list[float]] = {one.fleet.devices: [] for one in fleets}
    ours: dict[int, list[float]] = {one.fleet.devices: [] for one in fleets}
    bare: dict[int, list[float]] = {one.fleet.devices: [] for one in fleets}
    for one in fleets:
        one.asked.get(listed)
    for _ in range(size.rounds):
        for one in fleets:
            devices, asked, driver = one.fleet.devices, one.asked, one.driver
            statements = asked.statements(listed)
            ours[devices].append(_cpu_ms(lambda asked=asked: asked.get(listed), size.requests))
            bare[devices].append(_cpu_ms(lambda driver=driver, them=statements: driver.run(them), size.requests))
            for _ in range(3):
                started = time.perf_counter()
                asked.get("/overview")
                overview[devices].append((time.perf_counter() - started) * 1000)
    for devices, times in overview.items():
        checks.report(f"{name}, {devices}: overview, whole request, ms, p50", float(np.quantile(times, 0.5)))
        checks.at_most(
            f"{name}, {devices}: overview, whole request, ms, p95", float(np.quantile(times, 0.95)), OVERVIEW_MS
        )
    for devices, times in ours.items():
        checks.report(f"{name}, {devices}: list of 50 devices, CPU ms a request", statistics.median(times))
        checks.report(f"{name}, {devices}: its statements by the driver, CPU ms", statistics.median(bare[devices]))
    small, large = (statistics.median(ours[one.fleet.devices]) for one in (fleets[0], fleets[-1]))
    checks.at_most(f"{name}: list of 50 devices, CPU of the large fleet by the small one", large / small, GROWTH)


def _cpu_ms(do: Callable[[], object], times: int) -> float:
    started = time.process_time()
    for _ in range(times):
        do()
    return (time.process_time() - started) * 1000 / times


def write(folder: Path, found: dict[str, list[dict[str, Any]]], rows: dict[str, dict[str, int]]) -> None:
    """Times and plans for people and for machines."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "queries.json").write_text(json.dumps({"rows": rows, "questions": found}, indent=1))
    lines = ["# What requests cost at the database\n"]
    for name, questions_of in found.items():
        counts = ", ".join(f"{count:,} {table}" for table, count in sorted(rows[name].items()))
        lines += [f"\n## {name}\n", f"{counts}\n", "| question | p50 ms | p95 ms | reads whole |", "|---|---|---|---|"]
        lines += [
            f"| {it['question']} | {it['p50_ms']:.2f} | {it['p95_ms']:.2f} | {', '.join(it['whole'])} |"
            for it in questions_of
        ]
        for it in questions_of:
            lines.append(f"\n### {it['question']}: `{it['path']}`\n")
            for statement in it["statements"]:
                lines += ["```", statement["statement"], "--", *statement["plan"], "```"]
    (folder / "queries.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / ".bench", help="where plans are kept")
    parser.add_argument("--only", choices=["SQLite", "PostgreSQL"])
    parser.add_argument("--devices", type=int, action="append", help="sizes of fleets in the place of both")
    given = parser.parse_args()
    size = SHORT if given.short else LONG
    if given.devices:
        size = Size(tuple(given.devices), size.repeats, size.rounds, size.requests)
    checks = Checks("queries")
    found: dict[str, list[dict[str, Any]]] = {}
    rows: dict[str, dict[str, int]] = {}
    for name in ("SQLite", "PostgreSQL"):
        if given.only not in {None, name} or (name == "PostgreSQL" and not postgresql_programs()):
            continue
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-queries-")))
            fleets = []
            for devices in size.fleets:
                url = f"sqlite:///{folder / f'{devices}.db'}" if name == "SQLite" else stack.enter_context(postgresql())
                fleets.append(stack.enter_context(standing(url, devices)))
            for one in fleets:
                label = f"{name}, {one.fleet.devices} devices"
                rows[label] = one.fleet.rows
                found[label] = measure(checks, name, one, size, judged=one is fleets[0])
            whole_requests(checks, name, fleets, size)
    write(given.out, found, rows)
    print(f"plans: {given.out / 'queries.md'}", file=sys.stderr)
    checks.print()


if __name__ == "__main__":
    main()
