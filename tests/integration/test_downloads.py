"""Downloads over HTTP: ranges for people with a role, and for devices with a ticket that they got over MQTT."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from agent.protocol.codec import decode, encode
from agent.protocol.lifecycle import Phase
from agent.protocol.messages import DeploymentReport, Reported, SourceNeed, SourceOffer
from agent.protocol.topics import DeviceTopic, device_topic
from agent.protocol.version import SPOKEN
from fleet_server.app import create_app, running
from fleet_server.clock import utc_now
from fleet_server.gateway.conduct import Conduct
from fleet_server.gateway.handlers import Handlers
from fleet_server.gateway.inbox import Message
from fleet_server.models import Deployment, DeviceIdentity, Variant
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.samples.receiving import Receiving
from fleet_server.samples.schemas import SAMPLES_FOLDER
from fleet_server.settings import Settings
from tests.integration.test_api import facts
from tests.integration.test_audit import make_ready, rollout_body
from tests.integration.test_tenants import ADMIN, Inspector, client, created

CONTENT = bytes(range(256)) * 40
BASE = "https://fleet.example:7470"


def receiving(app: FastAPI) -> Receiving:
    return Receiving(app.state.database, app.state.artifacts.below(SAMPLES_FOLDER), app.state.settings.state_dir)


class Fleet:
    """A server with a rollout to a device, and the way a device's message goes."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self.api = client(app, ADMIN)
        self.sent: list[tuple[str, bytes]] = []
        self.handlers = Handlers(
            app.state.database, app.state.settings, lambda *_: None, app.state.authority,
            Conduct(app.state.database), receiving(app), lambda topic, payload: self.sent.append((topic, payload)),
        )  # fmt: skip
        self.digest: str = created(self.api.post("/api/v1/uploads", content=CONTENT))["digest"]
        version = {"name": "1", "sources": [{"format": "onnx", "digest": self.digest}], "evaluation": self.digest}
        created(self.api.post("/api/v1/models/m/versions", json=version))
        created(self.api.post("/api/v1/profiles", json={"name": "p", "runtime": "onnx"}))
        wanted = {"version": "m@1", "profiles": ["p"]}
        variant = created(self.api.post("/api/v1/variants", json=wanted))[0]["id"]
        make_ready(app.state.database, variant, self.digest)
        with app.state.database.write() as session:  # the size that a real build would have measured
            row = session.get_one(Variant, variant)
            row.manifest = row.manifest | {"size": len(CONTENT)}
        self.say(DeviceTopic.REPORTED, Reported(SPOKEN, "b", 1, 0, facts()))
        self.say(DeviceTopic.REPORTED, Reported(SPOKEN, "b", 1, 0, facts()), "other")
        created(self.api.post("/api/v1/rollouts", json=rollout_body() | {"target": {"devices": ["d"]}}))

    def say(self, leaf: DeviceTopic, message: Any, device: str = "d") -> None:
        self.handlers.handle(Message(device_topic(device, leaf), encode(message)))

    def offer(self, device: str = "d", digest: str | None = None) -> SourceOffer:
        self.sent.clear()
        self.say(DeviceTopic.SOURCE_NEED, SourceNeed(digest or self.digest), device)
        ((topic, payload),) = self.sent
        assert topic == device_topic(device, DeviceTopic.SOURCE)
        return decode(payload, SourceOffer)

    def fetch(self, ticket: str, **headers: str) -> Any:
        anonymous = TestClient(self.app, base_url="http://localhost", raise_server_exceptions=False)
        headers["Authorization"] = f"Bearer {ticket}"
        return anonymous.get(f"/api/v1/device-artifacts/{self.digest}", headers=headers)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    settings = Settings(
        state_dir=tmp_path_factory.mktemp("state"), broker_url="mqtt://127.0.0.1:1", conversion_workers=0,
        admin_token=ADMIN, download_url=BASE,
    )  # fmt: skip
    app = create_app(settings)
    with running(app):
        app.state.inspector = Inspector()
        yield Fleet(app)


def test_a_device_fetches_what_it_is_to_run(fleet: Fleet) -> None:
    offer = fleet.offer()
    assert offer.url == f"{BASE}/api/v1/device-artifacts/{fleet.digest}"
    assert offer.expires_in_s > 60
    whole = fleet.fetch(offer.ticket)
    assert (whole.status_code, whole.content) == (200, CONTENT)
    assert whole.headers["accept-ranges"] == "bytes"
    part = fleet.fetch(offer.ticket, Range="bytes=100-299")
    assert (part.status_code, part.content) == (206, CONTENT[100:300])
    assert part.headers["content-range"] == f"bytes 100-299/{len(CONTENT)}"


def test_nobody_is_offered_what_they_are_not_to_run(fleet: Fleet) -> None:
    assert fleet.offer("other") == SourceOffer(fleet.digest)
    assert fleet.offer("d", "b" * 64) == SourceOffer("b" * 64)


def test_a_ticket_is_for_one_content_and_a_while(fleet: Fleet) -> None:
    app = fleet.app
    for ticket in (
        "",
        ADMIN,
        app.state.tickets.issue("d", "b" * 64, 5, time.time()),
        app.state.tickets.issue("d", fleet.digest, 5, time.time() - 3600),
    ):
        answer = fleet.fetch(ticket)
        assert (answer.status_code, answer.json()["code"]) == (401, "bad_ticket")
    used = client(app, fleet.offer().ticket).get("/api/v1/devices")
    assert used.status_code == 401, "it opens nothing else"


def test_a_locked_out_device_fetches_nothing(fleet: Fleet) -> None:
    ticket = fleet.offer().ticket
    with fleet.app.state.database.write() as session:
        session.add(DeviceIdentity(fleet_id=DEFAULT_FLEET, device_id="d", created_by="a", revoked_at=utc_now()))
    assert fleet.fetch(ticket).status_code == 401
    with fleet.app.state.database.write() as session:
        session.delete(session.get_one(DeviceIdentity, "d"))
    assert fleet.fetch(ticket).status_code == 200


def test_people_get_ranges_too(fleet: Fleet) -> None:
    path = f"/api/v1/artifacts/{fleet.digest}"
    etag = fleet.api.get(path).headers["etag"]
    assert etag == f'"{fleet.digest}"'
    part = fleet.api.get(path, headers={"Range": "bytes=-3", "If-Range": etag})
    assert (part.status_code, part.content) == (206, CONTENT[-3:])
    assert fleet.api.get(path, headers={"Range": "bytes=0-1", "If-Range": '"other"'}).content == CONTENT
    beyond = fleet.api.get(path, headers={"Range": f"bytes={len(CONTENT)}-"})
    assert (beyond.status_code, beyond.json()["code"]) == (416, "range")
    assert beyond.headers["content-range"] == f"bytes */{len(CONTENT)}"


def test_the_server_keeps_which_source_brought_what(fleet: Fleet) -> None:
    (row,) = fleet.api.get("/api/v1/deployments?device=d").json()["items"]
    said = DeploymentReport(row["id"], "m", "1", fleet.digest, Phase.DOWNLOADING, 7, sources={"mqtt": 3, "https": 4})
    unknown = DeploymentReport("bundle:default:1", "m", "1", fleet.digest, Phase.ACTIVE)
    fleet.say(DeviceTopic.REPORTED, Reported(SPOKEN, "b", 2, 1, facts(), (said, unknown)))
    (row,) = fleet.api.get("/api/v1/deployments?device=d").json()["items"]
    assert (row["phase"], row["sources"]) == ("downloading", {"mqtt": 3, "https": 4})
    many = DeploymentReport(row["id"], "m", "1", fleet.digest, Phase.VERIFYING, sources={str(n): n for n in range(17)})
    fleet.say(DeviceTopic.REPORTED, Reported(SPOKEN, "b", 3, 1, facts(), (many,)))
    with fleet.app.state.database.read() as session:
        assert session.get_one(Deployment, row["id"]).phase == "downloading", "too many sources: refused whole"


def test_without_a_setting_nothing_is_offered(fleet: Fleet, tmp_path: Path) -> None:
    state = fleet.app.state
    silent = Handlers(
        state.database, Settings(state_dir=tmp_path), lambda *_: None, state.authority, Conduct(state.database),
        receiving(fleet.app), lambda topic, payload: fleet.sent.append((topic, payload)),
    )  # fmt: skip
    fleet.sent.clear()
    silent.handle(Message(device_topic("d", DeviceTopic.SOURCE_NEED), encode(SourceNeed(fleet.digest))))
    assert decode(fleet.sent[0][1], SourceOffer) == SourceOffer(fleet.digest)
    with pytest.raises(ValueError, match="https"):
        Settings(download_url="http://fleet.example")
