"""A connection of a pipeline's own to a broker, by MQTT 3.1.1, which every broker speaks."""

from __future__ import annotations

import hashlib
import ssl
from urllib.parse import unquote, urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

KEEPALIVE_S = 15
RECONNECT_MAX_S = 30


def new_client(url: str, ca_file: str, identity: str, *, manual_ack: bool = False) -> paho.Client:
    """A client that is not connected yet, whose session the broker keeps.

    Args:
        url: of the broker.
        ca_file: certificates to believe; empty for the system's.
        identity: the same after a restart, and no other client's.
        manual_ack: whether messages that come are acknowledged by `ack`.

    Raises:
        OSError: when `ca_file` can't be read.
    """
    parts = urlsplit(url)
    client = paho.Client(
        CallbackAPIVersion.VERSION2,
        client_id="shoal" + hashlib.sha256(identity.encode()).hexdigest()[:16],
        clean_session=False,
        manual_ack=manual_ack,
    )
    client.reconnect_delay_set(1, RECONNECT_MAX_S)
    if parts.username:
        client.username_pw_set(unquote(parts.username), unquote(parts.password or ""))
    if parts.scheme == "mqtts":
        client.tls_set_context(ssl.create_default_context(cafile=ca_file or None))
    return client


def connect(client: paho.Client, url: str) -> None:
    """Connect in the background, and keep connecting."""
    parts = urlsplit(url)
    port = parts.port or (8883 if parts.scheme == "mqtts" else 1883)
    client.connect_async(parts.hostname or "", port, keepalive=KEEPALIVE_S)
    client.loop_start()


def place(url: str) -> str:
    """A broker as people are told of it."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")
