"""A server in this process with its own Mosquitto under mutual TLS, and devices that do what they please."""

from __future__ import annotations

import queue
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
from fastapi import FastAPI
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from starlette.testclient import TestClient

from agent.identity import Identity, load_into
from agent.keys import fingerprint, new_key, signing_request
from fleet_server.app import create_app, running
from fleet_server.settings import Settings
from tests.fleet import free_port, wait_until

ADMIN = "the-admin-of-tests"


class SecureServer:
    """The application, its REST client, and its broker's port."""

    def __init__(self, folder: Path, app: FastAPI, api: TestClient, port: int) -> None:
        self.folder, self.app, self.api, self.port = folder, app, api, port

    def post(self, path: str, body: Any = None, status: int = 201) -> Any:
        answer = self.api.post(f"/api/v1{path}", json=body)
        assert answer.status_code == status, f"{path}: {answer.status_code} {answer.text}"
        return answer.json()

    def get(self, path: str) -> Any:
        answer = self.api.get(f"/api/v1{path}")
        assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text}"
        return answer.json()

    def ask(self, device_id: str, key: str, token: str | None = None, status: int = 200) -> Any:
        body = {"device_id": device_id, "csr": signing_request(key, device_id), "token": token}
        return self.post("/enrolments", body, status)

    def identity(self, device_id: str, key: str | None = None) -> Identity:
        """Of a device that enrols with a token of its own."""
        key = key or new_key()
        given = self.ask(device_id, key, self.post("/enrolment-tokens", {})["token"])
        assert given["state"] == "issued", given
        return identity_of(given, key)


def identity_of(given: Any, key: str) -> Identity:
    return Identity(
        device_id=given["device_id"],
        key=key,
        key_sha256=fingerprint(key),
        certificate=given["certificate"],
        ca=given["ca"],
        broker=given["broker"],
        not_before=time.time(),
        not_after=time.time() + 90 * 86_400,
    )


@contextmanager
def secure_server(folder: Path, **settings: Any) -> Iterator[SecureServer]:
    port = free_port()
    options = {"conversion_workers": 0, "broker_tls": True, "broker_port": port, **settings}
    app = create_app(Settings(state_dir=folder, admin_token=ADMIN, **options))
    with running(app):
        api = TestClient(app, base_url="http://127.0.0.1", headers={"Authorization": f"Bearer {ADMIN}"})
        wait_until("the broker", lambda: api.get("/readyz").status_code == 200, 20)
        yield SecureServer(folder, app, api, port)
        api.close()


class Peer:
    """A device's connection that nobody made behave."""

    def __init__(
        self,
        server: SecureServer,
        folder: Path,
        identity: Identity | None,
        *,
        client_id: str = "",
        will: str = "",
        port: int | None = None,
        protocol: MQTTProtocolVersion = MQTTProtocolVersion.MQTTv5,
    ) -> None:
        self.messages: queue.Queue[paho.MQTTMessage] = queue.Queue()
        self.connects: queue.Queue[Any] = queue.Queue()
        self.lost: queue.Queue[Any] = queue.Queue()
        self.granted: queue.Queue[list[Any]] = queue.Queue()
        self.acknowledged: queue.Queue[tuple[int, Any]] = queue.Queue()
        client = paho.Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=protocol)
        context = ssl.create_default_context(cadata=server.app.state.authority.ca.bundle)
        if identity is not None:
            folder.mkdir(parents=True, exist_ok=True)
            load_into(context, folder, identity)
        client.tls_set_context(context)
        if will:
            client.will_set(will, b"{}", qos=1)
        client.max_queued_messages_set(0)
        client.on_connect = lambda _c, _d, _f, reason, _p: self.connects.put(reason)
        client.on_disconnect = lambda _c, _d, _f, reason, _p: self.lost.put(reason)
        client.on_message = lambda _c, _d, message: self.messages.put(message)
        client.on_subscribe = lambda _c, _d, _mid, reasons, _p: self.granted.put(reasons)
        client.on_publish = lambda _c, _d, mid, reason, _p: self.acknowledged.put((mid, reason))
        self.client, self._port = client, port or server.port
        self._clean: dict[str, Any] = {"clean_start": True} if protocol is MQTTProtocolVersion.MQTTv5 else {}

    def connect(self, seconds: float = 10) -> bool:
        """Whether the broker accepts it."""
        try:
            self.client.connect("127.0.0.1", self._port, keepalive=20, **self._clean)
        except (OSError, ssl.SSLError):
            return False
        self.client.loop_start()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                return not self.connects.get(timeout=0.05).is_failure
            except queue.Empty:
                if not self.lost.empty():
                    break
        self.close()
        return False

    def subscribe(self, topic: str) -> bool:
        """Whether the broker grants it."""
        self.client.subscribe(topic, 1)
        return not self.granted.get(timeout=10)[0].is_failure

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """Whether the broker takes it."""
        sent = self.client.publish(topic, payload, qos=1, retain=retain)
        while True:  # what was sent at QoS 0 is noted too
            mid, reason = self.acknowledged.get(timeout=20)
            if mid == sent.mid:
                return not reason.is_failure

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()
