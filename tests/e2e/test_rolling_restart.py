"""Two servers are replaced one after the other under load: no request fails, and nothing that devices say is lost."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator

import httpx
import pytest

from fleet_server.simulator.behaviours import read
from fleet_server.simulator.population import populate
from fleet_server.simulator.runner import Simulation
from tests.balancer import Balancer
from tests.databases import postgresql, postgresql_programs
from tests.faults.cluster import mosquitto
from tests.fleet import wait_until
from tests.servers import TOKEN, Servers

pytestmark = pytest.mark.skipif(not postgresql_programs(), reason="PostgreSQL is not installed")
DEVICES = 20
BEHAVIOURS = "classes: [{name: pi, profile: raspberry-pi-5, requests: {per_s: 5}}]"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mosquitto(tmp_path_factory.mktemp("broker")) as url:
        yield url


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, broker: str) -> Iterator[Servers]:
    with postgresql() as url:
        found = Servers(
            tmp_path_factory.mktemp("servers"), url, broker,
            SHOAL_DRAIN_S="1", SHOAL_TELEMETRY_INTERVAL_S="0.5",
        )  # fmt: skip
        try:
            found.start("a")
            found.share_ca("a")
            found.start("b")
            yield found
        finally:
            found.stop_all()


class Load(threading.Thread):
    """Asks and changes things without a pause, and notes what failed."""

    def __init__(self, port: int, *, kept: bool) -> None:
        super().__init__(daemon=True)
        self._port, self._kept = port, kept
        self.over = threading.Event()
        self.failures: list[str] = []
        self.made: list[str] = []
        self.asked = 0

    def run(self) -> None:
        options = {"base_url": f"http://127.0.0.1:{self._port}/api/v1", "headers": {"Authorization": f"Bearer {TOKEN}"}}
        limits = httpx.Limits(max_keepalive_connections=1 if self._kept else 0)
        with httpx.Client(timeout=20, limits=limits, **options) as api:  # type: ignore[arg-type]
            while not self.over.wait(0.02):
                try:
                    self._ask(api)
                except httpx.TransportError as error:
                    self.failures.append(repr(error))

    def _ask(self, api: httpx.Client) -> None:
        self.asked += 1
        if self.asked % 4:
            answer = api.get("/devices", params={"limit": 5})
        else:
            name = f"t{uuid.uuid4().hex[:12]}"
            body = {"name": name, "match": {"arch": "none"}, "runtime": "onnx", "precisions": ["fp32"]}
            answer = api.post("/profiles", json=body, headers={"Idempotency-Key": name})
            self.made.append(name)
        if answer.status_code >= 400:
            self.failures.append(f"{answer.status_code} {answer.text[:200]}")


def test_replaced_one_after_the_other(servers: Servers, broker: str) -> None:
    wanted = read(BEHAVIOURS)
    with (
        Balancer([servers.ports[name] for name in "ab"]) as balancer,
        Simulation(broker, populate(wanted, DEVICES, 0), wanted.effects) as devices,
    ):
        wait_until("both", lambda: balancer.ready == 2, 20)
        wait_until("telemetry", lambda: devices.counts().acknowledged > DEVICES, 30)
        load = [Load(balancer.port, kept=kept) for kept in (True, False)]
        for one in load:
            one.start()
        for name in "ab":
            servers.stop(name)
            servers.start(name)
            wait_until("both again", lambda: balancer.ready == 2, 20)
        time.sleep(1)
        for one in load:
            one.over.set()
            one.join(20)
        assert [failure for one in load for failure in one.failures] == []
        assert sum(one.asked for one in load) > 50
        there = {one["name"] for one in servers.get("/profiles", limit=500)["items"]}
        assert {name for one in load for name in one.made} <= there

        def caught_up() -> bool:
            return devices.counts().spooled <= DEVICES

        wait_until("all telemetry", caught_up, 30)
        counts = devices.counts()
        assert counts.broken == 0, counts.problem
        assert {one["online"] for one in servers.get("/devices", limit=100)["items"]} == {True}
        for name in "ab":
            assert "took over" not in servers.log(name), "it was handed over, not lost"
