"""A device that was lost is out within seconds: real Mosquitto, real certificates."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.identity import load_into
from agent.keys import new_key
from agent.protocol.topics import DeviceTopic, device_topic
from tests.broker_peer import Peer, SecureServer, identity_of, secure_server
from tests.fleet import wait_until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureServer]:
    with secure_server(tmp_path_factory.mktemp("server")) as found:
        yield found


def resumed(server: SecureServer, context: ssl.SSLContext, session: ssl.SSLSession | None) -> ssl.SSLSession | None:
    """Do a handshake and read until the server says something; gives the session, or None when it hangs up."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain:
        try:
            with context.wrap_socket(plain, server_hostname="127.0.0.1", session=session) as wrapped:
                connect = b"\x10\x0f\x00\x04MQTT\x05\x02\x00\x0a\x00\x00\x02id"
                wrapped.sendall(connect)
                return wrapped.session if wrapped.recv(64) else None
        except OSError:
            return None


def test_a_lost_device_is_thrown_out_and_stays_out(server: SecureServer, tmp_path: Path) -> None:
    lost, other = server.identity("lost-1"), server.identity("kept-1")
    peer, kept = Peer(server, tmp_path / "lost", lost), Peer(server, tmp_path / "kept", other)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # its sessions can be resumed in a way that Python can ask for
    load_into(context, tmp_path / "lost", lost)
    session = resumed(server, context, None)
    assert session is not None
    assert resumed(server, context, session) is not None
    assert peer.connect()
    assert kept.connect()
    began = time.monotonic()
    found = server.post("/devices/lost-1/revoke", status=200)
    assert found["revoked_at"]
    wait_until("the eviction", lambda: server.get("/devices/lost-1/identity")["evicted_at"], 60)
    assert time.monotonic() - began < 60
    assert not Peer(server, tmp_path / "lost", lost).connect(3)
    assert resumed(server, context, session) is None
    assert not peer.client.is_connected()
    assert kept.client.is_connected()
    assert kept.lost.empty()
    assert kept.subscribe(device_topic("kept-1", DeviceTopic.DESIRED))
    assert "BEGIN X509 CRL" in server.api.get("/api/v1/crl").text
    # Its key is of no use any more, and another one needs an operator.
    refused = server.ask("lost-1", lost.key, server.post("/enrolment-tokens", {})["token"], status=403)
    assert refused["code"] == "key_locked_out"
    key = new_key()
    waiting = server.ask("lost-1", key, server.post("/enrolment-tokens", {})["token"])
    assert (waiting["state"], waiting["reason"]) == ("pending", "the device was locked out")
    server.post(f"/enrolments/{waiting['id']}/approve", status=200)
    back = server.get(f"/enrolments/{waiting['id']}")
    again = Peer(server, tmp_path / "again", identity_of(back, key))
    assert again.connect()
    for one in (kept, again):
        one.close()
