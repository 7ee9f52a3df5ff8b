"""The API's own page in a real browser: every operation is there, and nothing is fetched from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.api_document import document
from tests.fleet import LocalFleet


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"))
    try:
        fleet.start_server()
        yield fleet
    finally:
        fleet.stop()


def test_the_page_lists_every_operation_without_the_internet(
    fleet: LocalFleet, browser: Browser, pictures: Path
) -> None:
    # As high as the page: what is far below is not drawn before somebody scrolls there.
    page = browser.new_page(viewport={"width": 1200, "height": 16_000})
    page.set_default_timeout(120_000)  # a machine that runs tests may be busy
    requests: list[str] = []
    problems: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(f"{fleet.url}/docs")
    page.wait_for_selector(".opblock")
    expect(page.locator(".opblock")).to_have_count(sum(len(item) for item in document()["paths"].values()))
    page.locator("#operations-rollouts-create_rollout .opblock-summary-control").click()
    page.wait_for_selector("#operations-rollouts-create_rollout .opblock-body")
    assert "latency_p95_ratio" in page.locator("#operations-rollouts-create_rollout .opblock-body").inner_text()
    page.screenshot(path=pictures / "api-page.png", full_page=True)
    assert problems == []
    assert [url for url in requests if not url.startswith((fleet.url, "data:"))] == []
    page.close()
