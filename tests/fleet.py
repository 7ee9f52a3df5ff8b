"""A whole fleet on this machine for tests: real server, broker and agent processes that can be killed for real."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fleet_server.gateway.broker import find_mosquitto
from tests.forked import ForkedServer

BIN = Path(sys.executable).parent
AGENT = (str(BIN / "shoal-agent"),)
NATS = shutil.which("nats-server") or shutil.which("nats-server", path=str(BIN))
ValueT = TypeVar("ValueT")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(what: str, condition: Callable[[], ValueT | None], seconds: float = 90.0) -> ValueT:
    """Poll until the condition is truthy; refused connections count as not yet."""
    began = time.monotonic()
    while (asked := time.monotonic()) < began + seconds:
        with contextlib.suppress(httpx.TransportError):
            value = condition()
            if value:
                return value
        # To ask takes time from those who are waited for: the longer it takes, and the longer it goes on, the rarer.
        now = time.monotonic()
        time.sleep(min(0.25, max(0.05, 3 * (now - asked), (now - began) / 40)))
    raise AssertionError(f"waited {seconds:.0f} s for {what}")


def write_classifier(path: Path, *, seed: int = 0, hidden: int = 16, right: bool = True) -> None:
    """A classifier of 8 numbers into 3 classes: the largest of the first three, through a hidden layer.

    With `right=False` it has the same format and answers wrongly. `hidden` sets its size: hidden² floats.
    """
    rng = np.random.default_rng(seed)
    first = np.zeros((8, hidden), np.float32)
    order = (0, 1, 2) if right else (1, 2, 0)
    for column, row in enumerate(order):
        first[row, column] = 1.0
    middle = (rng.standard_normal((hidden, hidden)) * 1e-4 / hidden).astype(np.float32)
    middle[:3, :3] += np.eye(3, dtype=np.float32)
    last = np.zeros((hidden, 3), np.float32)
    last[:3, :3] = np.eye(3)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "first"], ["a"]),
            helper.make_node("MatMul", ["a", "middle"], ["b"]),
            helper.make_node("MatMul", ["b", "last"], ["scores"]),
        ],
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 3])],
        [
            numpy_helper.from_array(value, name)
            for name, value in (("first", first), ("middle", middle), ("last", last))
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, str(path))


def write_data(path: Path, *, rows: int, seed: int, labelled: bool = True) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, 8)).astype(np.float32)
    arrays = {"x": x, "y": x[:, :3].argmax(1).astype(np.int64)} if labelled else {"x": x}
    np.savez(path, **arrays)


class LocalFleet:
    """Server (with its own broker, or an external one) and agents, each a process.

    Args:
        folder: for all their state.
        external_broker: it is `start_broker`'s.
        tls: for API and broker.
        forked: the server need not import what another has, nor make the tables of its database.
    """

    def __init__(self, folder: Path, *, external_broker: bool = False, tls: bool = False, forked: bool = True) -> None:
        self.folder = folder
        self._forked = forked
        self.port, self.broker_port = free_port(), free_port()
        self.tls = tls
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self.ca_file = folder / "server" / "ca" / "ca.pem"
        self.external_broker = external_broker
        self.api = httpx.Client(base_url=f"{self.url}/api/v1", timeout=180)
        self.token = ""
        self.processes: dict[str, subprocess.Popen[bytes] | ForkedServer] = {}
        self.agent_ports: dict[str, int] = {}
        self._agent_configs: dict[str, Path] = {}

    def start_broker(self, *, acl: str = "") -> None:
        """An external Mosquitto that takes everybody; with rules of an access list of its own."""
        config = self.folder / "mosquitto.conf"
        config.write_text(
            f"listener {self.broker_port} 127.0.0.1\nallow_anonymous true\nmax_queued_messages 100000\n"
            "persistence false\n"
        )
        if acl:
            (self.folder / "acl").write_text(acl)
            with config.open("a") as file:
                file.write(f"acl_file {self.folder / 'acl'}\nuser root\n")  # or it could not read it
        executable, environment = find_mosquitto("mosquitto")
        self._spawn("broker", [str(executable), "-c", str(config)], dict(environment))

    def start_server(self, *, answers: str = "/readyz", **variables: str) -> None:
        """Start it and wait until a path answers: `/healthz` does without a broker."""
        broker = (
            {"SHOAL_BROKER_URL": f"mqtt{'s' if self.tls else ''}://127.0.0.1:{self.broker_port}"}
            if self.external_broker
            else {"SHOAL_BROKER_PORT": str(self.broker_port)}
        )
        environment = {
            "SHOAL_STATE_DIR": str(self.folder / "server"),
            "SHOAL_PORT": str(self.port),
            "SHOAL_TELEMETRY_INTERVAL_S": "1",
            "SHOAL_PROBATION_S": "0.3",
            "SHOAL_ENGINE_TICK_S": "0.2",
            # Each rollout waits for differences that a process makes first: only where they matter.
            "SHOAL_DELTAS": "false",
            "SHOAL_DELTA_WAIT_S": "120",  # a machine that runs tests may be busy
            "SHOAL_INSPECT_TIMEOUT_S": "250",  # likewise
            **({"SHOAL_TLS": "true", "SHOAL_BROKER_TLS": "true"} if self.tls else {}),
            **broker,
            **variables,
        }
        if self._forked and all(name.startswith("SHOAL_") for name in variables):
            self.processes["server"] = ForkedServer({**os.environ, **environment}, self.folder / "server.log")
        else:  # what Python itself is told counts for an interpreter that starts
            self._spawn("server", [str(BIN / "shoal-server")], environment)
        wait_until("the server", lambda: self._alive("server") and self._ready(answers))
        if self.tls:
            self.api.close()
            self.api = httpx.Client(base_url=f"{self.url}/api/v1", timeout=180, verify=self._verify())
        given = variables.get("SHOAL_ADMIN_TOKEN")
        self.token = given or (self.folder / "server" / "admin-token").read_text().strip()
        self.api.headers.update(self.authorization)

    @property
    def authorization(self) -> dict[str, str]:
        """The header of the server's admin."""
        return {"Authorization": f"Bearer {self.token}"}

    def _verify(self) -> ssl.SSLContext | bool:
        return ssl.create_default_context(cafile=str(self.ca_file)) if self.tls else True

    def ready(self) -> bool:
        """Whether the server reaches its broker."""
        return self._ready("/readyz")

    def _ready(self, path: str) -> bool:
        if self.tls and not self.ca_file.exists():
            return False
        return httpx.get(f"{self.url}{path}", verify=self._verify()).status_code == 200

    def enroll(
        self, name: str, *options: str, token: str | None = None, server: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `shoal-agent enroll` for a device; with a new token of its own unless one is given."""
        if token is None:
            token = self.post("/enrolment-tokens", {})["token"]
        return subprocess.run(
            [*AGENT, "enroll", "--server", server or self.url, "--token", token, *options],
            env={**os.environ, **self.agent_variables(name)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def agent_variables(self, name: str) -> dict[str, str]:
        return {"SHOAL_AGENT_DEVICE_ID": name, "SHOAL_AGENT_STATE_DIR": str(self.folder / name)}

    def start_agent(
        self,
        name: str,
        *,
        tables: str = "",
        program: Sequence[str] = AGENT,
        broker_port: int | None = None,
        **tags: str,
    ) -> None:
        """Start it; what it is configured with is that of its first start.

        Args:
            name: its id.
            tables: of its configuration, as TOML; `{port}` is that of its local API.
            program: runs it in place of its console script.
            broker_port: in the place of the fleet's.
            tags: of the device.
        """
        if name not in self._agent_configs:
            self.agent_ports[name] = free_port()
            config = self.folder / f"{name}.toml"
            config.write_text(
                f"device_id = {json.dumps(name)}\nstate_dir = {json.dumps(str(self.folder / name))}\n"
                + ("" if self.tls else f'broker = "mqtt://127.0.0.1:{broker_port or self.broker_port}"\n')
                + f'listen = "127.0.0.1:{self.agent_ports[name]}"\n'
                + tables.replace("{port}", str(self.agent_ports[name]))
                + "[tags]\n"
                + "".join(f"{key} = {json.dumps(value)}\n" for key, value in tags.items())
            )
            self._agent_configs[name] = config
        self._spawn(name, [*program, "run", "--config", str(self._agent_configs[name])])

    def kill(self, name: str) -> None:
        """SIGKILL, as a power cut would."""
        process = self.processes.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def end_leases(self) -> None:
        """Those that a killed server held, as if their time had passed: some last for most of a minute."""
        with contextlib.closing(sqlite3.connect(self.folder / "server" / "shoal.db")) as database, database:
            database.execute("DELETE FROM leases")

    def stop(self) -> None:
        self.api.close()  # a server that speaks TLS waits for its clients' goodbye
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def post(self, path: str, body: Any = None, *, status: int = 201) -> Any:
        answer = self.api.post(path, json=body)
        assert answer.status_code == status, f"{path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    def get(self, path: str, **parameters: Any) -> Any:
        answer = self.api.get(path, params=parameters)
        assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text}"
        return answer.json()

    def upload(self, path: Path) -> str:
        content = path.read_bytes()
        answer = self.api.post("/uploads", content=content)
        assert answer.status_code in {200, 201}, answer.text
        digest = answer.json()["digest"]
        assert digest == hashlib.sha256(content).hexdigest()
        return str(digest)

    def push(self, model: str, version: str, file: Path, *, gate: dict[str, Any] | None = None) -> None:
        evaluation = self.folder / "evaluation.npz"
        calibration = self.folder / "calibration.npz"
        if not evaluation.exists():
            write_data(evaluation, rows=200, seed=1)
            write_data(calibration, rows=100, seed=2, labelled=False)
        self.post(
            f"/models/{model}/versions",
            {
                "name": version,
                "sources": [{"format": "onnx", "digest": self.upload(file)}],
                "calibration": self.upload(calibration),
                "evaluation": self.upload(evaluation),
                "gate": gate or {},
            },
        )

    def build(self, reference: str, *profiles: str) -> list[dict[str, Any]]:
        """Ask for variants, wait, and return them all."""
        asked = self.post("/variants", {"version": reference, "profiles": list(profiles)}, status=202)
        ids = [variant["id"] for variant in asked]

        def built(one: str) -> dict[str, Any] | None:
            found: dict[str, Any] = self.get(f"/variants/{one}")
            return None if found["state"] in {"queued", "building"} else found

        return [wait_until("a variant", partial(built, one), 240) for one in ids]

    def rollout(self, reference: str, **fields: Any) -> str:
        body: dict[str, Any] = {"version": reference, "target": {"all": True}}
        body["strategy"] = {"stages": [{"percent": 100}]}
        body |= {"allow_unproven": True, **fields}
        return str(self.post("/rollouts", body)["id"])

    def rollout_state(self, rollout: str) -> str:
        return str(self.get(f"/rollouts/{rollout}")["state"])

    def deployments(self, rollout: str) -> list[dict[str, Any]]:
        return list(self.get(f"/rollouts/{rollout}/deployments")["items"])

    def infer(self, agent: str, model: str, rows: np.ndarray) -> dict[str, Any]:
        body = {
            "id": "1",
            "inputs": [
                {"name": "x", "datatype": "FP32", "shape": list(rows.shape), "data": rows.flatten().tolist()},
            ],
        }
        answer = httpx.post(
            f"http://127.0.0.1:{self.agent_ports[agent]}/v2/models/{model}/infer", json=body, timeout=30
        )
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def _alive(self, name: str) -> bool:
        process = self.processes[name]
        assert process.poll() is None, f"{name} ended with {process.returncode}:\n{self.log(name)[-4000:]}"
        return True

    def start_nats(self, executable: str, config: Path) -> None:
        """As the broker, in place of Mosquitto."""
        self._spawn("broker", [executable, "-c", str(config)])

    def _spawn(self, name: str, command: list[str], environment: dict[str, str] | None = None) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
            )
