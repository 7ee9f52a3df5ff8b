"""Devices of a LAN for tests: real workers that know each other by mutual TLS, with the test as their supervisor."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from agent.protocol.manifest import Manifest, Scheduling
from agent.protocol.messages import ModelWindow
from agent.serving.ipc import AskFigures, Collect, Peek, Peeked, PeerTrust, TellFigures, TellPeers, Window
from agent.telemetry.figures import SupervisorFigures
from agent.update.source_tls import Credentials
from fleet_server.trust.ca import FleetCa
from tests import sleeping_runtime
from tests.fleet import free_port, wait_until
from tests.serving_worker import ServingWorker, serve, start_worker
from tests.unit.agent.test_peers import enrolled

QUEUE = 4
FULL = Scheduling(queue_limit=QUEUE)
LABELS = ("answered", "refused", "full", "absent", "failed")
FIGURES = SupervisorFigures(
    "d", connected=True, spooled=0, spooled_bytes=0, spool_dropped=0, workers_ended=0, problems=0, rss_mb=1.0
)
Reply = tuple[int, dict[str, str], bytes]


class Device:
    """A worker that peers may ask.

    Args:
        lan: of the test.
        name: its id.
        trust: how it is known; None for plain HTTP.
        grpc: whether its local API is served by gRPC too.
    """

    def __init__(self, lan: Lan, name: str, trust: PeerTrust | None, *, grpc: bool = False) -> None:
        self.place = f"127.0.0.1:{free_port()}"
        self.trust = trust
        self._folder = lan.folder
        self._name = name
        self.worker: ServingWorker = start_worker(
            environment=lan.environment, for_peers=self.place, grpc=("127.0.0.1:0",) if grpc else ()
        )

    def serve(self, milliseconds: float = 50.0, model: str = "slow", **fields: Any) -> Manifest:
        """Let it answer for a model."""
        path = self._folder / f"{self._name}-{model}"
        manifest = sleeping_runtime.write_model(path, milliseconds, **{"model": model, "scheduling": FULL, **fields})
        serve(self.worker.channel, manifest, path, deployment=model)
        return manifest

    def told(self, *peers: Device, **fields: Any) -> None:
        """Tell it whom it may ask; it answers whoever asks it."""
        places = tuple(one.place for one in peers)
        self.worker.channel.send(TellPeers(**{"peers": places, "serve": True, "trust": self.trust, **fields}))

    def ask(self, row: np.ndarray, headers: dict[str, str] | None = None, model: str = "slow", **said: Any) -> Reply:
        """What its local API answers."""
        return ask(self.worker.address, row, headers, model, **said)

    def flood(self, count: int) -> list[Reply]:
        """So many at once, each another row."""
        return flood(self.worker.address, count)

    @contextlib.contextmanager
    def held(self, model: str = "slow", waiting: int = QUEUE) -> Iterator[None]:
        """It is at an inference that does not end, and so many requests wait meanwhile."""
        gate = (self._folder / f"{self._name}-{model}").with_suffix(".held")
        gate.touch()

        def ask_in_vain() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                while self.ask(row_of(-1), {"Shoal-Hops": "1"}, model)[0] == 429:  # so nobody else is asked for it
                    time.sleep(0.01)

        threads = [threading.Thread(target=ask_in_vain, daemon=True) for _ in range(waiting + 1)]
        try:
            threads[0].start()
            wait_until("an inference", lambda: model in self._running(), 20)
            for one in threads[1:]:
                one.start()
            wait_until("a queue", lambda: self.metrics(model)["queue_requests"] == waiting, 20)
            yield
        finally:
            gate.unlink()
            for one in threads:
                one.join()

    def _running(self) -> list[str]:
        """Deployments of the models that are at an inference."""
        self.worker.channel.send(Peek(8))
        while not isinstance(said := self.worker.channel.receive(), Peeked):
            pass
        return [one.deployment_id for one in said.models if one.running_s > 0]

    def window(self) -> ModelWindow:
        """What it counted of its model since the last time."""
        self.worker.channel.send(Collect(7))
        while not isinstance(said := self.worker.channel.receive(), Window):
            pass
        return next(one for one in said.models if one.model == "slow")

    def metrics(self, model: str = "slow") -> dict[str, float]:
        """What it says of its queue and of peers, by name and the labels that matter."""
        with ThreadPoolExecutor(1) as threads:
            asked = threads.submit(self._metrics)
            while not isinstance(self.worker.channel.receive(), AskFigures):
                pass
            self.worker.channel.send(TellFigures(FIGURES))
            lines = asked.result()
        found: dict[str, float] = {}
        for line in lines:
            name, _, value = line.rpartition(" ")
            name, _, labels = name.removeprefix("shoal_agent_").partition("{")
            wanted = "peer" in name or "forward" in name or name == "queue_requests"
            if line.startswith("shoal_agent_") and wanted and ("model=" not in labels or f'"{model}"' in labels):
                label = next((one for one in LABELS if f'"{one}"' in labels), "")
                found[f"{name} {label}".strip()] = float(value)
        return found

    def _metrics(self) -> list[str]:
        connection = http.client.HTTPConnection(*self.worker.address, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            return connection.getresponse().read().decode().splitlines()

    def end(self) -> None:
        """Let it go."""
        self.worker.channel.close()
        self.worker.process.wait(20)


class Lan:
    """Devices of one fleet.

    Args:
        folder: for all their state.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = sleeping_runtime.install(folder / "runtime")
        self.ca = FleetCa.open(folder / "ca", "f")
        self._devices = ExitStack()

    def device(self, name: str, *, grpc: bool = False) -> Device:
        """One more."""
        trust = Credentials(enrolled(self.folder, self.ca, name)).for_worker()
        return self._kept(Device(self, name, trust, grpc=grpc))

    def devices(self, *names: str) -> list[Device]:
        """Several, that start together."""
        with ThreadPoolExecutor(len(names)) as threads:
            return list(threads.map(self.device, names))

    def plain(self, name: str) -> Device:
        """One without certificates."""
        return self._kept(Device(self, name, None))

    def _kept(self, device: Device) -> Device:
        self._devices.callback(device.end)
        return device

    def end(self) -> None:
        """Let all of them go."""
        self._devices.close()


def row_of(number: int) -> np.ndarray:
    return np.full((1, 3), number, np.float32)


def ask(
    address: tuple[str, int], row: np.ndarray, headers: dict[str, str] | None = None, model: str = "slow", **said: Any
) -> Reply:
    """What a local API answers."""
    body, length = request(row, **said)
    connection = http.client.HTTPConnection(*address, timeout=90)
    with contextlib.closing(connection):
        given = {"Inference-Header-Content-Length": str(length), **(headers or {})}
        connection.request("POST", f"/v2/models/{model}/infer", body, given)
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()


def flood(address: tuple[str, int], count: int, model: str = "slow") -> list[Reply]:
    """So many at once, each another row."""
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda number: ask(address, row_of(number), None, model), range(count)))


def request(row: np.ndarray, **parameters: Any) -> tuple[bytes, int]:
    """A request with binary tensors both ways, and the length of its JSON."""
    blob = row.astype(np.float32).tobytes()
    tensor = {"name": "x", "datatype": "FP32", "shape": list(row.shape), "parameters": {"binary_data_size": len(blob)}}
    header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True, **parameters}}).encode()
    return header + blob, len(header)
