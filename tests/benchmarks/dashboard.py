"""`make bench-dashboard`: how soon a person sees something of a fleet of 10,000 devices with a month of telemetry.

A real server over a database that is filled first, and Chromium on the same machine. First paint and first content are
what the browser itself reports (Paint Timing), from the click on; the server's part is that of the page's document.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from playwright.sync_api import Page, sync_playwright

from fleet_server import migrations
from fleet_server.db import Database
from tests.benchmarks.common import Checks
from tests.big_fleet import build
from tests.fleet import LocalFleet

PAINT_MS = 1000.0
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
PAGES = {
    "overview, 30 days": "/ui?span=30d",
    "devices": "/ui/devices",
    "devices, by a query": "/ui/devices?query=online==true;site==plant7",
    "rollouts": "/ui/rollouts",
    "models": "/ui/models",
    "alerts": "/ui/alerts",
    "audit": "/ui/audit",
}
TIMING = """() => {
  const paints = Object.fromEntries(performance.getEntriesByType("paint").map((one) => [one.name, one.startTime]));
  const [page] = performance.getEntriesByType("navigation");
  return { paint: paints["first-contentful-paint"] ?? 0, server: page.responseEnd - page.requestStart };
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a small fleet, to see that it works")
    options = parser.parse_args()
    devices, times = (200, 2) if options.short else (10_000, 7)
    checks = Checks("dashboard")
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), devices) as fleet, browser() as page:
        page.goto(f"{fleet.url}/ui/sign-in")
        page.get_by_text("With a token instead").click()
        page.get_by_label("Token").fill(fleet.token)
        page.get_by_role("button", name="Sign in").click()
        page.wait_for_url("**/ui")
        for name, path in PAGES.items():
            found = [seen(page, f"{fleet.url}{path}") for _ in range(times)]
            paint = statistics.median(one["paint"] for one in found)
            checks.at_most(f"{name}: first content, ms", paint, PAINT_MS)
            checks.report(f"{name}: the server's part, ms", statistics.median(one["server"] for one in found))
    checks.print()


def seen(page: Page, url: str) -> dict[str, Any]:
    """When a page showed something, in ms since it was asked for."""
    answer = page.goto(url)
    assert answer is not None
    if answer.status != 200:
        raise RuntimeError(f"{url}: {answer.status}\n{page.inner_text('body')[:500]}")
    while True:  # the page's policy allows no waiting for an expression
        found: dict[str, Any] = page.evaluate(TIMING)
        if found["paint"]:
            return found
        page.wait_for_timeout(20)


@contextmanager
def serving(folder: Path, devices: int) -> Iterator[LocalFleet]:
    """A server of such a fleet."""
    fleet = LocalFleet(folder, forked=False)
    state = folder / "server"
    state.mkdir()
    url = f"sqlite:///{state / 'shoal.db'}"
    migrations.upgrade(url)
    database = Database(url)
    build(database, devices, lambda said: print(said, file=sys.stderr, flush=True))
    database.dispose()
    try:
        fleet.start_server()
        yield fleet
    finally:
        fleet.stop()


@contextmanager
def browser() -> Iterator[Page]:
    """A page of Chromium."""
    found = shutil.which("chromium")
    if found is None:
        raise SystemExit("Chromium is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=OPTIONS)
        yield opened.new_page(viewport={"width": 1280, "height": 900})
        opened.close()


if __name__ == "__main__":
    main()
