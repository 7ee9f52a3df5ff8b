"""A new user in a real browser: signs in, pushes a model, sees variants appear, rolls out, watches, and takes it back.

Every page is looked at in light, dark and on a phone: pictures are kept, and axe finds nothing serious.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect

from agent.protocol.release import own_platform
from fleet_server.alerts.evaluation import evaluate
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.settings import Settings
from tests.fleet import LocalFleet, wait_until, write_classifier, write_data
from tests.tiny_bundle import tiny_bundle

LOOKS: dict[str, dict[str, Any]] = {
    "light": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light", "has_touch": True},
}
# Colours are looked at where they differ, and what a page is made of once: axe takes most of the time. It is asked for
# what is wrong alone: what is right is most of every page.
WRONG = {"resultTypes": ["violations"], "selectors": False}
RULES: dict[str, dict[str, Any]] = {
    "light": WRONG,
    "dark": {**WRONG, "runOnly": {"type": "rule", "values": ["color-contrast"]}},
    "phone": {**WRONG, "rules": {"color-contrast": {"enabled": False}}},
}
PASSWORD = "seven grey herrings"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """A server with three devices of one profile, and a user who may roll out."""
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"))
    try:
        fleet.start_server()
        for name in ("cam-1", "cam-2", "cam-3"):
            fleet.start_agent(name, site="plant7")
        profile = {
            "name": "cameras",
            "match": {"tags.site": "plant7"},
            "runtime": "onnx",
            "precisions": ["fp32", "int8"],
        }
        fleet.post("/profiles", profile | {"budgets": {"accuracy_drop_points": 5}})
        fleet.post("/users", {"name": "ada", "password": PASSWORD, "role": "admin"})
        write_classifier(fleet.folder / "tri.onnx")
        write_data(fleet.folder / "evaluation.npz", rows=200, seed=1)
        write_data(fleet.folder / "calibration.npz", rows=100, seed=2, labelled=False)
        wait_until("three devices", lambda: len([d for d in fleet.get("/devices")["items"] if d["profile"]]) == 3)
        yield fleet
    finally:
        fleet.stop()


@pytest.fixture
def problems() -> list[str]:
    """What a page's console complains of."""
    return []


@pytest.fixture(scope="module")
def signed_in(fleet: LocalFleet, browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(base_url=fleet.url, **LOOKS["light"])
    context.set_default_timeout(120_000)  # a machine that runs tests may be busy
    page = context.new_page()
    page.goto("/")
    expect(page).to_have_url(re.compile("/ui/sign-in"))
    page.get_by_label("Name").fill("ada")
    page.get_by_label("Password").fill("wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("wrong")
    page.get_by_label("Name").fill("ada")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("button", name="Sign out")).to_be_visible()
    page.close()
    yield context
    context.close()


@pytest.fixture
def page(signed_in: BrowserContext, problems: list[str]) -> Iterator[Page]:
    page = signed_in.new_page()
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    yield page
    page.close()
    assert problems == []


def test_from_a_file_to_a_rollout_that_is_taken_back(fleet: LocalFleet, page: Page) -> None:
    push(fleet, page, "1")
    expect(page.get_by_role("heading", level=1)).to_have_text("tri@1")
    page.get_by_role("button", name="Build").click()
    expect(page.locator(".badge.ready")).to_be_visible(timeout=120_000)  # told by the server: nobody reloads the page
    page.get_by_role("link", name="cameras").click()
    expect(page.get_by_role("heading", name="Candidates")).to_be_visible()
    expect(page.locator("tbody")).to_contain_text(["picked"])

    fleet.rollout("tri@1")
    wait_until("tri@1 everywhere", lambda: fleet.get("/rollouts")["items"][0]["state"] == "succeeded")
    push(fleet, page, "2")
    fleet.build("tri@2", "cameras")
    page.reload()
    page.get_by_role("link", name="Roll out").click()
    sizes = page.get_by_label("Size of the stage")
    for at, size in enumerate(("1", "100")):
        sizes.nth(at).fill(size)
    page.get_by_label("Unit").first.select_option("count")
    page.get_by_label("Seconds to watch").nth(0).fill("1")
    page.get_by_label("Seconds to watch").nth(1).fill("600")
    page.get_by_label("Remove the stage").nth(2).click()
    page.get_by_label("also variants that no device has measured yet").check()
    page.get_by_role("button", name="Dry run").click()
    expect(page.locator("#preview")).to_contain_text("would start")
    page.get_by_role("button", name="Start").click()

    expect(page.get_by_role("heading", name="Stop rules")).to_be_visible()
    expect(page.locator(".stages .open")).to_contain_text("Stage 2", timeout=60_000)
    expect(page.locator(".stat", has_text="active").first).to_contain_text("3", timeout=60_000)
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Abort and revert").click()
    expect(page.locator(".badge.reverted")).to_be_visible(timeout=60_000)
    serving = [one["version"] for device in fleet.get("/devices")["items"] for one in device["serving"]]
    assert serving == ["1", "1", "1"]


def test_drift_is_found_and_shown_beside_what_was_first(fleet: LocalFleet, page: Page, problems: list[str]) -> None:
    page.goto("/ui/drift")
    expect(page.get_by_role("heading", name="Nothing was looked at yet")).to_be_visible()
    rule = fleet.post("/alert-rules", {"name": "moved", "metric": "input_drift", "threshold": 0.25, "window_s": 60})
    for middle in (0.0, 3.0):
        ask(fleet, "cam-1", middle)
        ask(fleet, "cam-2", 0.0)
        look_for_drift(fleet, rule["id"])
    page.reload()
    rows = page.locator("tbody tr")
    expect(rows).to_have_count(2)
    expect(rows.first).to_contain_text("cam-1")
    expect(rows.first).to_contain_text("beyond a threshold")
    expect(rows.last).not_to_contain_text("beyond")
    rows.first.get_by_role("link", name="tri@1").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Drift of tri@1")
    expect(page.locator(".stat", has_text="input drift")).to_contain_text("of rule")
    expect(page.locator(".note")).to_contain_text("when it was first looked at")
    inputs = page.locator("section", has_text="input x: mean of each row")
    expect(inputs.get_by_role("img")).to_be_visible()
    inputs.get_by_text("The same as a table").click()
    shares = [float(text.removesuffix(" %")) for text in inputs.locator("tbody td:nth-child(2)").all_inner_texts()]
    assert sum(shares) == pytest.approx(100, abs=2)
    page.get_by_label("Devices", exact=True).fill("site=")
    page.get_by_role("button", name="Look").click()
    expect(page.get_by_role("alert")).to_contain_text("query")
    problems.clear()  # that a page was answered with 4xx, Chromium says too


def ask(fleet: LocalFleet, device: str, middle: float) -> None:
    """Enough requests for a reference; until the server knows of them."""

    def known() -> int:
        found = fleet.get("/telemetry/models", device=device, model="tri")["items"]
        return sum(one["requests"] for one in found)

    chance, before = np.random.default_rng(1), known()
    for _ in range(220):
        fleet.infer(device, "tri", chance.normal(middle, 1, (2, 8)).astype(np.float32))
    wait_until("all of it is told", lambda: known() >= before + 220)


def look_for_drift(fleet: LocalFleet, rule: str) -> None:
    """As the server does every ten minutes, now, and at a fleet whose devices tell what they do every few seconds."""
    settings = Settings(telemetry_interval_s=10, state_dir=fleet.folder / "server")
    database = Database(settings.effective_database_url)
    evaluate(database, settings, rule, utc_now())
    database.dispose()


def drag(page: Page, box: Locator, file: Path) -> None:
    """Drag a file of this machine over the window and let it fall into a box."""
    dragged = page.evaluate_handle(
        """([name, content]) => {
            const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0)), data = new DataTransfer();
            data.items.add(new File([bytes], name));
            return data;
        }""",
        [file.name, base64.b64encode(file.read_bytes()).decode()],
    )
    over = re.compile(r"\bover\b")
    for event in ("dragenter", "dragover"):
        box.dispatch_event(event, {"dataTransfer": dragged})
        expect(box).to_have_class(over)
    box.dispatch_event("drop", {"dataTransfer": dragged})
    expect(box).not_to_have_class(over)


def push(fleet: LocalFleet, page: Page, version: str) -> None:
    page.goto("/ui/models/new")
    page.get_by_label("Model", exact=True).fill("tri")
    page.get_by_label("Version").fill(version)
    for label, file in (
        ("Model file", "tri.onnx"),
        ("Evaluation rows", "evaluation.npz"),
        ("Calibration", "calibration.npz"),
    ):
        box = page.locator(".drop", has_text=label)
        if file == "tri.onnx":
            drag(page, box, fleet.folder / file)
        else:
            box.locator("input[type=file]").set_input_files(fleet.folder / file)
        expect(box.get_by_role("status")).to_contain_text("uploaded")
    page.get_by_role("button", name="Push").click()
    expect(page).to_have_url(re.compile(f"/ui/models/tri/{version}$"))


def test_bad_input_is_answered_where_it_was_typed(page: Page, problems: list[str]) -> None:
    page.goto("/ui/devices")
    page.get_by_role("textbox", name="Query").fill("site=")
    page.get_by_role("button", name="Find").click()
    expect(page.get_by_role("alert")).to_contain_text("query")
    expect(page.get_by_role("textbox", name="Query")).to_have_value("site=")
    page.goto("/ui/rollouts/new?version=nothing@1")
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_role("alert")).to_contain_text("nothing")
    page.get_by_label("Name (optional)").fill("n" * 300)
    page.get_by_role("button", name="Start").click()
    expect(page.locator("#wrong-name")).to_be_visible()
    problems.clear()  # that a page was answered with 4xx, Chromium says too


def test_what_was_uploaded_stays_where_the_form_is_refused(fleet: LocalFleet, page: Page, problems: list[str]) -> None:
    page.goto("/ui/models/new")
    page.get_by_label("Model", exact=True).fill("tri")
    page.get_by_label("Version").fill("mended")
    for label, file in (("Model file", "tri.onnx"), ("Evaluation rows", "evaluation.npz")):
        box = page.locator(".drop", has_text=label)
        box.locator("input[type=file]").set_input_files(fleet.folder / file)
        expect(box.get_by_role("status")).to_contain_text("uploaded")
    page.get_by_label("Lowest accuracy").fill("70 %")
    page.get_by_role("button", name="Push").click()
    expect(page.locator("#wrong-min_accuracy")).to_be_visible()
    expect(page.locator(".drop", has_text="Model file").get_by_role("status")).to_contain_text(
        "tri.onnx: uploaded before"
    )
    page.get_by_label("Lowest accuracy").fill("0.7")
    page.get_by_role("button", name="Push").click()
    expect(page).to_have_url(re.compile("/ui/models/tri/mended$"))
    page.goto("/ui/models")  # the version's own page would look again, and find none
    fleet.api.delete("/models/tri/versions/mended").raise_for_status()
    problems.clear()  # that a page was answered with 4xx, Chromium says too


def test_a_release_of_the_agent_is_pushed_seen_and_led_into_the_rollout_form(
    fleet: LocalFleet, page: Page, problems: list[str]
) -> None:
    page.goto("/ui")
    page.get_by_role("link", name="Agent releases").click()
    expect(page.get_by_role("heading", name="No release yet")).to_be_visible()
    page.get_by_role("link", name="Push a release").click()
    box, push_it = page.locator(".drop", has_text="Bundle"), page.get_by_role("button", name="Push")
    push_it.click()
    expect(page.get_by_label("Bundle", exact=True)).to_have_accessible_description(re.compile("choose the file"))
    box.locator("input[type=file]").set_input_files(fleet.folder / "tri.onnx")
    expect(box.get_by_role("status")).to_contain_text("uploaded")
    push_it.click()
    expect(page.get_by_label("Bundle", exact=True)).to_have_accessible_description(re.compile("make agent-release"))
    problems.clear()  # that a page was answered with 4xx, Chromium says too
    bundle = fleet.folder / "shoal-agent-9.0.0.shoal-release"
    bundle.write_bytes(tiny_bundle("9.0.0"))
    drag(page, box, bundle)
    expect(box.get_by_role("status")).to_contain_text("uploaded (")
    push_it.click()
    expect(page).to_have_url(re.compile("/ui/agent-releases/9.0.0$"))
    expect(page.get_by_role("heading", level=1)).to_have_text("shoal-agent@9.0.0")
    expect(page.get_by_role("region", name="Bundles")).to_contain_text("signed")
    page.get_by_role("link", name="Agent releases").click()
    expect(page.get_by_role("region", name="Agent releases")).to_contain_text("9.0.0")
    page.get_by_role("link", name="9.0.0").click()
    page.get_by_role("link", name="Roll out").click()
    expect(page.get_by_label("Version", exact=True)).to_have_value("shoal-agent@9.0.0")
    page.get_by_role("button", name="Dry run").click()
    expect(page.locator("#preview")).to_contain_text("By platform")
    expect(page.locator("#preview")).to_contain_text(own_platform())


def test_devices_are_found_and_tagged_together(fleet: LocalFleet, page: Page) -> None:
    page.goto("/ui/devices")
    page.get_by_role("textbox", name="Query").fill("id==cam-*")
    page.get_by_role("button", name="Find").click()
    page.get_by_label("Tick cam-1").check()
    page.get_by_label("Tick cam-3").check()
    page.get_by_label("Tag", exact=True).fill("line")
    page.get_by_label("Value").fill("4")
    page.get_by_role("button", name="Set").click()
    expect(page.get_by_role("status")).to_contain_text("2 devices changed")
    assert [one["id"] for one in fleet.get("/devices", query="line==4")["items"]] == ["cam-1", "cam-3"]
    page.get_by_label("all that the query holds for").check()
    page.get_by_label("Tag", exact=True).fill("floor")
    page.get_by_label("Value").fill("1")
    page.get_by_role("button", name="Set").click()
    expect(page.get_by_role("status")).to_contain_text("3 devices changed")
    page.get_by_role("link", name="cam-2").click()
    expect(page.locator("main")).to_contain_text("floor=1")


def test_a_device_is_held_with_the_keyboard_alone(fleet: LocalFleet, page: Page) -> None:
    page.goto("/ui/devices/cam-1")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.get_by_label("Why no rollout may touch it").focus()
    page.keyboard.type("being moved")
    page.keyboard.press("Enter")
    expect(page.locator(".note", has_text="being moved")).to_be_visible()
    assert fleet.get("/devices/cam-1")["hold"]["by"] == "user/ada"
    page.get_by_role("button", name="Release").click()
    expect(page.locator(".note", has_text="being moved")).to_have_count(0)


def test_a_device_is_asked_to_do_something_and_its_log_is_followed(page: Page) -> None:
    page.goto("/ui/devices/cam-2")
    page.get_by_role("button", name="Measure facts again").click()
    expect(page.locator(".badge.succeeded")).to_be_visible(timeout=30_000)
    page.get_by_role("link", name="cam-2").click()
    page.get_by_role("button", name="Follow its log").click()
    expect(page.get_by_role("log")).to_contain_text("agent", timeout=30_000)
    page.get_by_role("button", name="End it").click()
    expect(page.locator(".badge.cancelled")).to_be_visible(timeout=30_000)


def test_a_silence_is_made_and_ended(page: Page) -> None:
    page.goto("/ui/alerts")
    page.get_by_label("Rule").nth(1).fill("*")
    page.get_by_label("Why").fill("works on the line")
    page.get_by_role("button", name="Silence").click()
    expect(page.locator("main")).to_contain_text("works on the line")
    page.get_by_role("button", name="End").click()
    expect(page.locator("main")).not_to_contain_text("works on the line")


def test_alert_rules_and_routes_are_made_changed_and_deleted(
    fleet: LocalFleet, page: Page, problems: list[str]
) -> None:
    page.on("dialog", lambda dialog: dialog.accept())
    page.goto("/ui/alerts")
    page.get_by_role("link", name="New rule").click()
    page.get_by_label("Name").fill("hot")
    page.get_by_label("Metric").select_option("temperature_c")
    page.get_by_label("Beyond").fill("hot")
    page.get_by_label("Only devices that this holds for").fill("site=")
    page.get_by_role("button", name="Make the rule").click()
    limit = page.get_by_label("Beyond")
    expect(limit).to_be_focused()
    expect(limit).to_have_value("hot")
    expect(limit).to_have_accessible_description(re.compile("number"))
    limit.fill("80")
    page.get_by_role("button", name="Make the rule").click()
    query = page.get_by_label("Only devices that this holds for")
    expect(query).to_have_accessible_description(re.compile("site="))
    query.fill("")
    page.get_by_label("Well again").fill("85")
    page.get_by_role("button", name="Make the rule").click()
    expect(page.get_by_label("Well again")).to_have_accessible_description(re.compile("bad side of threshold"))
    page.get_by_label("Well again").fill("75")
    page.get_by_role("button", name="Make the rule").click()
    rule = fleet.get("/alert-rules/hot")
    assert (rule["threshold"], rule["clear"], rule["for_s"], rule["below"]) == (80, 75, 300, False)

    page.get_by_role("link", name="hot").click()
    change = httpx.patch(
        f"{fleet.url}/api/v1/alert-rules/hot", json={"severity": "critical"}, headers=fleet.authorization
    )
    assert change.status_code == 200
    page.get_by_label("Beyond").fill("90")
    page.get_by_role("button", name="Change").click()
    expect(page.get_by_role("alert")).to_contain_text("changed")  # somebody else was faster: nothing is overwritten
    assert fleet.get("/alert-rules/hot")["threshold"] == 80
    page.goto("/ui/alert-rules/hot/change")
    page.get_by_label("Beyond").fill("90")
    page.get_by_role("button", name="Change").click()
    expect(page.locator("#rules")).to_contain_text("90 °C")
    page.get_by_role("link", name="hot").click()
    page.get_by_role("button", name="Delete the rule").click()
    expect(page.get_by_role("link", name="hot", exact=True)).to_have_count(0)

    page.get_by_role("link", name="New route").click()
    page.get_by_label("Name").fill("night")
    page.get_by_label("By", exact=True).select_option("mqtt")
    page.get_by_label("Addresses").fill("nobody")
    page.get_by_role("button", name="Make the route").click()
    expect(page.get_by_label("Addresses")).to_have_accessible_description(re.compile("no address"))
    page.get_by_label("Addresses").fill("")
    page.get_by_label("offline").check()
    page.get_by_role("button", name="Make the route").click()
    page.get_by_role("link", name="night").click()
    page.get_by_label("told again").fill("0")
    page.get_by_role("button", name="Change").click()
    route = fleet.get("/alert-routes/night")
    assert (route["rules"], route["repeat_s"]) == (["offline"], 0)
    page.get_by_role("link", name="night").click()
    page.get_by_role("button", name="Send a test notice").click()
    expect(page.get_by_role("status")).to_contain_text("shoal/v1/alerts")
    page.get_by_role("button", name="Delete the route").click()
    expect(page.get_by_role("link", name="night")).to_have_count(0)
    problems.clear()  # that a page was answered with 4xx, Chromium says too


def test_devices_are_asked_for_samples_and_say_why_they_have_none(
    fleet: LocalFleet, page: Page, problems: list[str]
) -> None:
    page.goto("/ui/samples")
    page.get_by_label("Model", exact=True).select_option("tri")
    page.get_by_label("Profile").select_option("cameras")
    page.get_by_label("Confidence below").fill("2")
    page.get_by_role("button", name="Keep").click()
    expect(page.get_by_label("Confidence below")).to_have_accessible_description(re.compile("less than or equal to 1"))
    page.get_by_label("Confidence below").fill("0.9")
    page.get_by_role("button", name="Keep").click()
    expect(page.get_by_role("region", name="What is kept")).to_contain_text("90 %")
    assert fleet.get("/models/tri/sampling-rules/cameras")["spec"]["below"] == 0.9
    page.get_by_label("Model", exact=True).first.select_option("tri")
    page.get_by_label("and these devices").fill("cam-1 cam-2")
    page.get_by_role("button", name="Ask", exact=True).click()
    rows = page.locator("tbody tr")
    expect(rows).to_have_count(2)
    expect(page.locator(".badge.done")).to_be_visible(timeout=30_000)  # their owners allow none: not_allowed
    expect(rows.first).to_contain_text("samples.allow = true")
    problems.clear()  # that a page was answered with 4xx, Chromium says too


def test_a_token_is_shown_once(page: Page) -> None:
    page.goto("/ui/access")
    section = page.locator("#enrolment")
    section.get_by_role("button", name="Make").click()
    expect(page.get_by_role("status")).to_contain_text("not shown again")
    page.goto("/ui/access")
    expect(page.get_by_role("status")).to_have_count(0)
    expect(page.locator("#enrolment")).to_contain_text("1 left")


def test_the_audit_log_tells_who_did_it_and_is_whole(page: Page) -> None:
    page.goto("/ui/audit?actor=user/ada")
    expect(page.locator("tbody")).to_contain_text("ada")
    page.get_by_role("button", name="Check that it is whole").click()
    expect(page.get_by_role("status")).to_contain_text("Whole")


def test_another_site_can_not_act_for_who_is_signed_in(fleet: LocalFleet, signed_in: BrowserContext) -> None:
    cookies = {one["name"]: one["value"] for one in signed_in.cookies()}
    headers = {"Cookie": f"shoal_session={cookies['shoal_session']}"}
    path = f"{fleet.url}/api/v1/devices/cam-1/hold"
    body = {"reason": "by another site"}
    for more in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://elsewhere.invalid"}, {}):
        assert httpx.post(path, json=body, headers=headers | more).status_code == 401
    assert httpx.get(f"{fleet.url}/api/v1/me", headers=headers).status_code == 200
    assert httpx.post(path, json=body, headers=headers | {"Sec-Fetch-Site": "same-origin"}).status_code == 200
    assert httpx.post(f"{fleet.url}/api/v1/devices/cam-1/release", headers=fleet.authorization).status_code == 200


def pages(fleet: LocalFleet) -> dict[str, str]:
    """Every page there is, by the name of its picture."""
    rollout = fleet.get("/rollouts")["items"][0]["id"]
    variant = fleet.get("/variants")["items"][0]["id"]
    command = fleet.get("/commands")["items"][0]["id"]
    asked = fleet.get("/sample-requests")["items"][0]["id"]
    return {
        "sign-in": "/ui/sign-in",
        "overview": "/ui",
        "alerts": "/ui/alerts",
        "alert-rule-new": "/ui/alert-rules/new",
        "alert-rule": "/ui/alert-rules/disk-short/change",
        "alert-route-new": "/ui/alert-routes/new",
        "alert-route": "/ui/alert-routes/webhooks/change",
        "samples": "/ui/samples",
        "sample-request": f"/ui/samples/requests/{asked}",
        "command": f"/ui/commands/{command}",
        "devices": "/ui/devices",
        "device": "/ui/devices/cam-1",
        "models": "/ui/models",
        "model": "/ui/models/tri",
        "model-new": "/ui/models/new",
        "version": "/ui/models/tri/1",
        "variant": f"/ui/variants/{variant}",
        "rollouts": "/ui/rollouts",
        "rollout-new": "/ui/rollouts/new?version=tri@1",
        "rollout": f"/ui/rollouts/{rollout}",
        "agent-releases": "/ui/agent-releases",
        "agent-release-new": "/ui/agent-releases/new",
        "agent-release": "/ui/agent-releases/9.0.0",
        "agent-rollout-new": "/ui/rollouts/new?version=shoal-agent@9.0.0",
        "drift": "/ui/drift",
        "drift-version": "/ui/drift/tri/1",
        "drift-of-nothing": "/ui/drift/tri/2",
        "audit": "/ui/audit",
        "access": "/ui/access",
        "not-found": "/ui/devices/nobody",
    }


@pytest.mark.parametrize("look", LOOKS)
def test_every_page_can_be_read_by_everyone(
    fleet: LocalFleet, browser: Browser, signed_in: BrowserContext, pictures: Path, look: str
) -> None:
    context = browser.new_context(base_url=fleet.url, **LOOKS[look])
    context.add_cookies([{**one, "url": fleet.url} for one in without_places(signed_in)])
    page, axe = context.new_page(), Axe()
    found: dict[str, list[str]] = {}
    elsewhere: list[str] = []
    page.on("request", lambda request: elsewhere.append(request.url) if not inside(fleet, request.url) else None)
    for name, path in pages(fleet).items():
        page.goto(path)
        page.screenshot(path=pictures / f"{name}-{look}.png", full_page=True)
        serious = [
            f"{one['id']}: {one['nodes'][0]['html'][:160]}"
            for one in axe.run(page, options=RULES[look]).response["violations"]
            if one["impact"] in {"serious", "critical"}
        ]
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        if wide > 0:
            serious.append(f"it is {wide} pixels wider than the window")
        if serious:
            found[name] = serious
    context.close()
    assert found == {}
    assert elsewhere == []


def without_places(context: BrowserContext) -> list[dict[str, Any]]:
    """Cookies of a context, for another of the same address."""
    return [{"name": one["name"], "value": one["value"], "httpOnly": True} for one in context.cookies()]


def inside(fleet: LocalFleet, url: str) -> bool:
    return url.startswith((fleet.url, "data:"))
