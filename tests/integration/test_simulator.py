"""Simulated devices on a real server and broker: they register, take rollouts, tell of themselves, and go back."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

from agent.protocol.commands import CommandKind
from agent.protocol.lifecycle import Phase
from fleet_server.app import create_app, running
from fleet_server.devices import shipped
from fleet_server.settings import Settings
from fleet_server.simulator.behaviours import Behaviours, read
from fleet_server.simulator.population import populate
from fleet_server.simulator.runner import Simulation
from fleet_server.web import api
from tests.fabricated import fabricate
from tests.fleet import free_port, wait_until
from tests.page_numbers import printed, shown, told

eventually = partial(wait_until, seconds=200.0)  # a busy machine's server takes its time
ADMIN = "the-admin-of-tests"
PROFILES = ("raspberry-pi-5", "x86-64-vnni")
FILE = """
classes:
  - name: pi
    share: 3
    profile: raspberry-pi-5
    tags: {site: "plant{1..3}"}
    requests: {per_s: 20}
    latency: {median_ms: 8}
    labels: {share: 0.2, accuracy: 0.9}
    load_s: 0.1
  - name: gateway
    share: 1
    profile: x86-64-vnni
    requests: {per_s: 30}
    load_s: 0.1
    link: {fetch: mqtt}
effects:
  - {version: "m@2", where: {class: pi}, latency_ratio: 5}
"""


class World:
    """A server with its broker in this process, and versions 1 and 2 of a model for two profiles."""

    def __init__(self, folder: Path, api: TestClient, broker: str) -> None:
        self.folder, self.api, self.broker = folder, api, broker

    def get(self, path: str, **parameters: Any) -> Any:
        answer = self.api.get(f"/api/v1{path}", params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, body: Any) -> Any:
        answer = self.api.post(f"/api/v1{path}", json=body)
        assert answer.status_code == 201, answer.text
        return answer.json()

    def devices(self) -> list[dict[str, Any]]:
        return list(self.get("/devices", limit=100)["items"])

    def rollout(self, version: str, **fields: Any) -> str:
        body = {"version": version, "target": {"all": True}, "allow_unproven": True, **fields}
        return str(self.post("/rollouts", {"strategy": {"stages": [{"percent": 100}]}, **body})["id"])

    def requests(self) -> int:
        return sum(one["requests"] for one in self.get("/telemetry/models", by="version")["items"])

    def state(self, rollout: str) -> str:
        return str(self.get(f"/rollouts/{rollout}")["state"])

    def served(self) -> set[str]:
        """Versions that answer; `none` where nothing does."""
        return {one["serving"][0]["version"] if one["serving"] else "none" for one in self.devices()}

    def failures(self, rollout: str) -> set[tuple[str, str]]:
        """Profiles on whose devices the version was taken back, and why."""
        found = self.get(f"/rollouts/{rollout}/deployments", limit=100)["items"]
        return {(one["profile"], one["failure"]["code"]) for one in found if one["phase"] == "rolled_back"}

    def phases(self, rollout: str) -> list[str]:
        return [one["phase"] for one in self.get(f"/rollouts/{rollout}/deployments", limit=100)["items"]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder, port = tmp_path_factory.mktemp("world"), free_port()
    app = create_app(
        Settings(
            state_dir=folder / "server",
            admin_token=ADMIN,
            conversion_workers=0,
            broker_tls=False,
            broker_port=port,
            telemetry_interval_s=1.0,
            probation_s=1.0,
            delta_wait_s=0.0,
        )
    )
    with running(app):
        client = TestClient(app, base_url="http://127.0.0.1", headers={"Authorization": f"Bearer {ADMIN}"})
        eventually("the broker", lambda: client.get("/readyz").status_code == 200)
        found = World(folder, client, f"mqtt://127.0.0.1:{port}")
        for name in PROFILES:
            found.post("/profiles", shipped.load(name))
        for version in "12":
            fabricate(app.state.database, app.state.artifacts, folder, "m", version)
        yield found
        client.close()


def does_what_it_is_asked(world: World, device: str) -> None:
    """Every command of the protocol, and what came of each."""
    results = {}
    for kind in CommandKind:
        asked = {"kind": kind.value} | ({"seconds": 0.5} if kind is CommandKind.BENCHMARK else {})
        made = world.post(f"/devices/{device}/commands", asked)
        path = f"/commands/{made['id']}"
        eventually(kind.value, lambda path=path: world.get(path)["state"] not in {"queued", "sent", "running"})
        found = world.get(path)
        assert (found["state"], found["detail"]) == ("succeeded", ""), kind
        results[kind] = found["result"]
        if kind is CommandKind.LOGS:
            lines = [one["text"] for one in world.get(f"{path}/log-lines")["items"]]
            assert results[kind] == {"lines": len(lines)}
            assert "m@1: active" in lines
    assert results[CommandKind.RESTART_RUNTIME]["models"] == ["m"]
    (measured,) = results[CommandKind.BENCHMARK]["benchmarks"]
    assert measured["latency_p50_ms"] < measured["latency_p95_ms"] < measured["latency_p99_ms"]
    assert results[CommandKind.IDENTIFY]["output"]


def sends_samples(world: World) -> None:
    """What was unsure is kept where a rule says so, and comes as a file that the server takes for one."""
    answer = world.api.put("/api/v1/models/m/sampling-rules/raspberry-pi-5", json={"samples": 20, "below": 0.9})
    assert answer.status_code == 200, answer.text

    def came() -> bool:
        made = world.post("/sample-requests", {"model": "m", "query": "id==sim-0000*", "samples": 5})
        path = f"/sample-requests/{made['id']}"
        eventually("samples", lambda: world.get(path)["state"] == "done")
        counts = world.get(path)["counts"]
        assert counts.get("failed", 0) == sum(
            one["reason"] == "off" for one in world.get(path)["uploads"] if one["state"] == "failed"
        )
        return counts.get("stored", 0) > 0

    eventually("some are kept", came)
    found = world.get("/sample-sets")["items"][0]
    content = world.api.get(f"/api/v1/sample-sets/{found['id']}/content").content
    with np.load(io.BytesIO(content)) as file:
        names = {name for name in file.files if name.startswith("0/in/")}
        assert names
        assert all(np.isfinite(file[name]).all() for name in names)


@pytest.fixture(scope="module")
def behaviours() -> Behaviours:
    return read(FILE)


def test_fifty_devices_take_a_rollout_and_tell_of_it(world: World, behaviours: Behaviours) -> None:
    population = populate(behaviours, 50, seed=1)
    with Simulation(world.broker, population, behaviours.effects, seed=1, interval_s=4.0) as simulation:
        eventually("50 devices", lambda: len(world.devices()) == 50)
        registered = {one["id"]: one for one in world.devices()}
        for one in population:
            assert registered[one.device_id]["profile"] in PROFILES
            assert registered[one.device_id]["tags"] == one.facts.tags
        rollout = world.rollout("m@1")
        eventually("m@1 everywhere", lambda: world.state(rollout) == "succeeded")
        assert world.phases(rollout) == ["active"] * 50
        assert simulation.counts().phases == {"m@1": {Phase.ACTIVE: 50}}
        eventually("telemetry", lambda: simulation.counts().acknowledged >= 50)
        does_what_it_is_asked(world, population[0].device_id)
        sends_samples(world)
        deployments = world.get(f"/rollouts/{rollout}/deployments", limit=100)["items"]
        sources = {name for one in deployments for name in one["sources"]}
        assert sources == {"simulated", "mqtt"}

        slow = world.rollout("m@2")  # on Pis: their own probation takes it back, and the server all of it
        eventually("m@2 reverted", lambda: world.state(slow) == "reverted")
        eventually("m@1 again", lambda: world.served() == {"1"})
        assert world.failures(slow) == {("raspberry-pi-5", "probation_failed")}
        ended = simulation.stop()
    eventually("goodbyes", lambda: not any(one["online"] for one in world.devices()))
    assert ended.refused == 0
    eventually("every request that devices told of", lambda: world.requests() == ended.requests)
    every_number_on_a_page_is_the_apis(world, slow)


def every_number_on_a_page_is_the_apis(world: World, rollout: str) -> None:
    """Pages of a fleet that has done something show no number that the API did not give them."""
    given: list[Any] = []
    checked = api._checked  # what pages ask is seen nowhere else

    def noted(answer: httpx.Response) -> httpx.Response:
        found = checked(answer)
        given.append(answer.json() if answer.content else None)
        return found

    device, asked = world.devices()[0]["id"], world.get("/sample-requests")["items"][0]["id"]
    sample_set, command = world.get("/sample-sets")["items"][0]["id"], world.get("/commands")["items"][0]["id"]
    paths = (
        "/ui", "/ui/devices", f"/ui/devices/{device}", "/ui/models", "/ui/models/m", "/ui/models/m/1", "/ui/rollouts",
        f"/ui/rollouts/{rollout}", "/ui/alerts", "/ui/samples", f"/ui/samples/requests/{asked}",
        f"/ui/samples/sets/{sample_set}", f"/ui/commands/{command}", "/ui/audit", "/ui/access",
    )  # fmt: skip
    words, seen, of_its_own = printed(), 0, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "_checked", noted)
        for path in paths:
            given.clear()
            page = world.api.get(path)
            assert page.status_code == 200, path
            numbers = shown(page.text)
            seen += len(numbers)
            of_its_own[path] = numbers - told(given) - words
    assert {path: found for path, found in of_its_own.items() if found} == {}
    assert seen > 200
