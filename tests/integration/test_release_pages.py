"""Pages of releases of the agent: what they show, and what they say where the API refuses. No browser, no device."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape
from typing import Any

import msgspec
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from agent.protocol.errors import WireErrorCode
from agent.protocol.facts import AgentFacts
from agent.protocol.lifecycle import Phase
from agent.protocol.messages import DeploymentReport, Failure, Reported
from agent.protocol.release import AGENT, own_platform
from agent.protocol.version import SPOKEN
from fleet_server.clock import utc_now
from fleet_server.web import api as web_api
from tests import rest
from tests.integration.test_api import facts
from tests.page_numbers import printed, shown, told
from tests.reporting import apply_report
from tests.tiny_bundle import tiny_bundle

Page = Any


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    with rest.serving(tmp_path_factory.mktemp("server"), None) as app:
        yield app


@pytest.fixture(scope="module")
def pages(application: FastAPI) -> TestClient:
    """A browser without scripts, of an admin."""
    headers = {"Authorization": f"Bearer {rest.TOKEN}", "Sec-Fetch-Site": "same-origin"}
    return TestClient(application, base_url="http://localhost", headers=headers, raise_server_exceptions=False)


class Told:
    """Devices as the server knows them, by what they say."""

    def __init__(self, application: FastAPI) -> None:
        self._app = application
        self._sequences: dict[str, int] = {}

    def say(self, device: str, *releases: DeploymentReport, version: str = "0.1.0", **agent: Any) -> None:
        """Its agent's version and facts, and where its releases are."""
        self._sequences[device] = self._sequences.get(device, 0) + 1
        measured = msgspec.structs.replace(facts(), agent_version=version, agent=AgentFacts(own_platform(), **agent))
        reported = Reported(SPOKEN, "boot", self._sequences[device], 0, measured, releases=releases)
        with self._app.state.database.write() as session:
            apply_report(session, self._app.state.settings, device, reported, utc_now())


@pytest.fixture(scope="module")
def fleet(application: FastAPI) -> Told:
    found = Told(application)
    found.say("cam-1", self_update="on", launcher=1, installed="0.1.0")
    found.say("cam-2", self_update="off", launcher=1, installed="0.1.0")
    return found


def text(page: Page) -> str:
    """What a person reads."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", page.text)).split())


def pushed(pages: TestClient, version: str, **fields: str) -> str:
    """The digest of a bundle that was pushed by form."""
    digest = uploaded(pages, tiny_bundle(version, **fields))
    answer = pages.post("/ui/agent-releases/new", data={"digest": digest, "digest_name": "x.shoal-release"})
    assert answer.url.path == f"/ui/agent-releases/{version}", text(answer)
    return digest


def uploaded(pages: TestClient, content: bytes) -> str:
    answer = pages.post("/api/v1/uploads", content=content)
    assert answer.is_success, answer.text
    return str(answer.json()["digest"])


def test_where_there_is_no_release_the_list_says_how_to_make_one(pages: TestClient) -> None:
    page = pages.get("/ui/agent-releases")
    assert "No release yet" in text(page)
    assert "make agent-release" in page.text
    assert "shoal agent-release push" in page.text
    assert pages.get("/ui/agent-releases/9.9.9").status_code == 404
    assert pages.post("/ui/agent-releases/9.9.9/delete", data={}).status_code == 404


def test_what_is_no_bundle_is_refused_at_its_field(pages: TestClient) -> None:
    page = pages.post("/ui/agent-releases/new", data={})
    assert page.status_code == 422
    assert "choose the file" in field_of(page)
    digest = uploaded(pages, b"this is no tar at all")
    page = pages.post("/ui/agent-releases/new", data={"digest": digest, "digest_name": "notes.txt"})
    assert page.status_code == 422
    assert "make agent-release" in field_of(page)
    assert "notes.txt: uploaded before" in text(page)  # what was uploaded stays
    page = pages.post("/ui/agent-releases/new", data={"digest": "0" * 64})
    assert "upload it first" in field_of(page)


def field_of(page: Page) -> str:
    found = re.search(r'id="wrong-digest">(.*?)</p>', page.text)
    assert found is not None, text(page)
    assert 'aria-describedby="wrong-digest"' in page.text
    return unescape(found[1])


def test_a_release_has_its_bundles_and_another_of_a_platform_is_refused(pages: TestClient, fleet: Told) -> None:
    digest = pushed(pages, "0.2.0", after="0.1.0")
    pushed(pages, "0.2.0", platform="linux-riscv64-musl-cp313")
    page = pages.get("/ui/agent-releases/0.2.0")
    assert text(page).count("signed") >= 2
    assert "0.1.0 and newer" in text(page)
    assert "linux-riscv64-musl-cp313" in page.text
    assert digest in page.text
    assert "held by this server" in text(page)
    assert "by token/" in text(page) or "by admin" in text(page)
    assert "It was never rolled out." in page.text
    other = uploaded(pages, tiny_bundle("0.2.0", entry="agent.other"))
    refused = pages.post("/ui/agent-releases/new", data={"digest": other})
    assert refused.status_code == 409
    assert "push it under another version" in text(refused)


def test_only_what_was_seen_and_never_rolled_out_is_deleted(pages: TestClient) -> None:
    pushed(pages, "0.3.0")
    tag = tag_of(pages.get("/ui/agent-releases/0.3.0"))
    pushed(pages, "0.3.0", platform="linux-riscv64-musl-cp313")
    refused = pages.post("/ui/agent-releases/0.3.0/delete", data={"tag": tag})
    assert refused.status_code == 412
    assert "changed" in text(refused)
    gone = pages.post("/ui/agent-releases/0.3.0/delete", data={"tag": tag_of(refused)})
    assert gone.url.path == "/ui/agent-releases"
    assert "0.3.0" not in gone.text
    assert pages.get("/api/v1/agent-releases/0.3.0").status_code == 404


def tag_of(page: Page) -> str:
    found = re.search(r'name="tag" value="([^"]*)"', page.text)
    assert found is not None, text(page)
    return unescape(found[1])


def test_its_rollout_is_begun_by_form_shown_and_told_of_by_the_device(pages: TestClient, fleet: Told) -> None:
    digest = pushed(pages, "0.4.0")
    form = pages.get("/ui/rollouts/new?version=shoal-agent@0.4.0")
    assert 'value="shoal-agent@0.4.0"' in form.text
    assert "all that update themselves" in form.text
    assert 'value="failed_percent" selected' in form.text
    assert "latency" not in form.text  # a release answers no requests: no rule could look at them
    wanted = {"version": "shoal-agent@0.4.0", "who": "all", "stage_size": "100", "stage_unit": "percent",
              "stage_soak": "3600", "stage_approval": ""}  # fmt: skip
    dry = pages.post("/ui/rollouts/preview", data=wanted)
    assert "would start" in text(dry)
    assert "By platform" in text(dry)
    assert "Proven" not in text(dry)
    assert 'self_update = "off"' in text(dry)
    assert "/ui/models/shoal-agent" not in dry.text
    rule = {"rule_metric": "latency_p95_ms", "rule_above": "5", "rule_against": "past"}
    refused = pages.post("/ui/rollouts/new", data=wanted | rule)
    assert "use failed_percent" in text(refused)
    assert 'value="latency_p95_ms" selected' in refused.text

    begun = pages.post("/ui/rollouts/new", data=wanted)
    rollout = begun.url.path
    assert begun.status_code == 200, text(begun)
    assert 'href="/ui/agent-releases/0.4.0"' in begun.text
    assert f'href="{rollout}"' in pages.get("/ui/agent-releases").text
    assert 'href="/ui/agent-releases/0.4.0"' in pages.get("/ui/rollouts").text
    page = pages.get("/ui/agent-releases/0.4.0")
    assert f'href="{rollout}"' in page.text
    assert "can't be deleted" in text(page)
    kept = pages.post("/ui/agent-releases/0.4.0/delete", data={"tag": ""})
    assert kept.status_code == 409
    assert "was rolled out" in text(kept)

    (deployment,) = pages.get(f"/api/v1{rollout.removeprefix('/ui')}/deployments").json()["items"]
    trial = DeploymentReport(deployment["id"], AGENT, "0.4.0", digest, Phase.PROBATION)
    on = {"self_update": "on", "launcher": 1, "installed": "0.1.0"}
    fleet.say("cam-1", trial, version="0.4.0", release=digest, **on)
    device = pages.get("/ui/devices/cam-1")
    assert "on trial" in text(device)
    assert "0.4.0, release" in text(device)
    counts = {one["version"]: one["devices"] for one in pages.get("/api/v1/agent-releases").json()["items"]}
    assert counts == {"0.4.0": 1, "0.2.0": 0}
    there = re.search(r'href="(/ui/devices[^"]*)">0.4.0<', pages.get("/ui").text)
    assert there is not None
    found = text(pages.get(unescape(there[1])))
    assert "cam-1" in found
    assert "cam-2" not in found
    assert 'href="/ui/agent-releases/0.4.0"' in device.text
    why = "it ended with 3 before it had proved itself"
    back = msgspec.structs.replace(
        trial, phase=Phase.ROLLED_BACK, failure=Failure(WireErrorCode.RELEASE_FAILED, why)
    )  # fmt: skip
    fleet.say("cam-1", back, **on)
    device = pages.get("/ui/devices/cam-1")
    assert "taken back" in text(device)
    assert f"release_failed {why}" in text(device)
    assert "self_update is off" in text(pages.get("/ui/devices/cam-2"))
    numbers_are_the_apis(pages, rollout)


def numbers_are_the_apis(pages: TestClient, rollout: str) -> None:
    given: list[Any] = []
    checked, words, own = web_api._checked, printed(), {}

    def noted(answer: Any) -> Any:
        given.append(checked(answer).json() if answer.content else None)
        return answer

    paths = ("/ui", "/ui/agent-releases", "/ui/agent-releases/0.2.0", "/ui/agent-releases/0.4.0", "/ui/devices/cam-1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(web_api, "_checked", noted)
        for path in (*paths, rollout):
            given.clear()
            page = pages.get(path)
            assert page.status_code == 200, path
            numbers = shown(page.text)
            assert numbers, path
            own[path] = numbers - told(given) - words
    assert {path: found for path, found in own.items() if found} == {}


def test_rollouts_are_listed_by_version(pages: TestClient) -> None:
    listed = pages.get("/api/v1/rollouts?version=shoal-agent@0.4.0").json()["items"]
    assert [one["version"] for one in listed] == ["0.4.0"]
    assert pages.get("/api/v1/rollouts?version=shoal-agent@0.2.0").json()["items"] == []
    assert pages.get("/api/v1/rollouts?version=shoal-agent@8").json()["code"] == "agent_release_not_found"
    assert pages.get("/api/v1/rollouts?version=m").json()["code"] == "bad_version"
