"""The agent's MQTT link: the one import of paho here. Callbacks only enqueue; nothing waits or raises inside them."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from agent.config import Config
from agent.protocol.codec import encode
from agent.protocol.messages import Presence
from agent.protocol.topics import DeviceTopic, broadcast_filter, device_topic, repair_filter

log = logging.getLogger(__name__)
SESSION_EXPIRY_S = 7 * 86_400
QUEUE_LIMIT = 200


@dataclass(frozen=True)
class MqttMessage:
    """What came in."""

    topic: str
    payload: bytes


@dataclass(frozen=True)
class LinkUp:
    """The broker has accepted the connection, and the device's topics are subscribed."""


class MqttLink:
    """The connection to the broker; it reconnects by itself with a growing delay.

    Args:
        config: broker and device id.
        boot_id: said in presence.
        put: takes every event; called from the link's thread, must not block.
    """

    def __init__(self, config: Config, boot_id: str, put: Callable[[MqttMessage | LinkUp], None]) -> None:
        self._device_id = config.device_id
        self._boot_id = boot_id
        self._put = put
        self._downloads: set[str] = set()
        parts = urlsplit(config.broker)
        tls = parts.scheme == "mqtts"
        self._address = (parts.hostname or "", parts.port or (8883 if tls else 1883))
        client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=f"shoal-{config.device_id}", protocol=MQTTProtocolVersion.MQTTv5
        )
        client.max_queued_messages_set(QUEUE_LIMIT)
        client.reconnect_delay_set(min_delay=1, max_delay=60)
        if parts.username:
            client.username_pw_set(unquote(parts.username), unquote(parts.password or ""))
        if tls:
            client.tls_set(ca_certs=config.ca_file or None)
        will = encode(Presence(online=False, boot_id=boot_id))
        client.will_set(device_topic(config.device_id, DeviceTopic.PRESENCE), will, qos=1, retain=True)
        client.on_socket_open = _no_delay
        client.on_connect = self._on_connect
        client.on_message = lambda _client, _data, message: put(MqttMessage(message.topic, bytes(message.payload)))
        self._client = client

    def start(self) -> None:
        """Connect in the background, and keep connecting."""
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = SESSION_EXPIRY_S
        self._client.connect_async(*self._address, keepalive=15, clean_start=False, properties=properties)
        self._client.loop_start()

    def stop(self) -> None:
        """Say goodbye and disconnect."""
        if self._client.is_connected():
            said = self.publish(
                DeviceTopic.PRESENCE, encode(Presence(online=False, boot_id=self._boot_id)), retain=True
            )
            if said is not None:
                said.wait_for_publish(2)
        self._client.disconnect()
        self._client.loop_stop()

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted the connection."""
        return self._client.is_connected()

    def publish(self, leaf: DeviceTopic, payload: bytes, *, retain: bool = False) -> paho.MQTTMessageInfo | None:
        """Send on one of the device's own topics at QoS 1; None when not connected (everything is said again then)."""
        if not self._client.is_connected():
            return None
        return self._client.publish(device_topic(self._device_id, leaf), payload, qos=1, retain=retain)

    def listen_to_broadcast(self, digest: str) -> None:
        """Receive an artifact's chunks; QoS 0, for what is lost is asked for again."""
        self._downloads.add(digest)
        if self._client.is_connected():
            self._client.subscribe(broadcast_filter(digest), qos=0)

    def stop_listening(self, digest: str) -> None:
        """Receive an artifact's chunks no more."""
        self._downloads.discard(digest)
        if self._client.is_connected():
            self._client.unsubscribe(broadcast_filter(digest))

    def _on_connect(self, client: paho.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            log.warning("the broker refused the connection: %s", reason)
            return
        leaves = (DeviceTopic.DESIRED, DeviceTopic.TELEMETRY_ACK, DeviceTopic.TRUST)
        own = [(device_topic(self._device_id, leaf), 1) for leaf in leaves]
        client.subscribe([*own, (repair_filter(self._device_id), 1)])
        for digest in list(self._downloads):
            client.subscribe(broadcast_filter(digest), qos=0)
        self._put(LinkUp())


def _no_delay(_client: Any, _data: Any, sock: Any) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
