"""The agent's MQTT link: the one import of paho here. Callbacks only enqueue; nothing waits or raises inside them.

MQTT 5, or 3.1.1 where the broker has no other. A client of paho has one version for life, so another version is another
client: a callback may make it and start it, for neither waits.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from agent.config import Config
from agent.packets import Buffers, MalformedPacketError, PacketReader
from agent.protocol.brokers import BrokerChoice, read_brokers
from agent.protocol.codec import encode
from agent.protocol.messages import Need, Presence
from agent.protocol.mqtt_version import UNSUPPORTED, MqttVersion, MqttVersionChoice
from agent.protocol.topics import (
    TO_DEVICE,
    DeviceTopic,
    broadcast_filter,
    client_id,
    device_topic,
    is_chunk_topic,
    repair_filter,
)

log = logging.getLogger(__name__)
SESSION_EXPIRY_S = 7 * 86_400
QUEUE_LIMIT = 200
RECONNECT_MAX_S = 60
KEEPALIVE_S = 15
LOOK_S = 3.0  # how often the library looks at the time where nothing comes or goes; each look wakes the processor


@dataclass(frozen=True)
class MqttMessage:
    """What came in."""

    topic: str
    payload: bytes


@dataclass(frozen=True)
class MqttChunk:
    """A large message: a chunk. Of others that are large a copy is made.

    Attributes:
        payload: may be read until `release`.
    """

    topic: str
    payload: memoryview
    buffer: bytearray
    buffers: Buffers

    def release(self) -> None:
        """It is not needed any more: another may be read into its memory."""
        self.buffers.give(self.buffer)


@dataclass(frozen=True)
class LinkUp:
    """The broker has accepted the connection, and the device's topics are subscribed.

    Attributes:
        epoch: how often `reconnect` was called before.
    """

    epoch: int = 0


class MqttLink:
    """The connection to the broker; it reconnects by itself, with a growing delay, to the next of its addresses.

    Args:
        config: broker and device id.
        boot_id: said in presence.
        put: takes every event; called from the link's thread, must not block.
        context: certificates for `mqtts://`.
    """

    def __init__(
        self,
        config: Config,
        boot_id: str,
        put: Callable[[object], None],
        context: ssl.SSLContext | None = None,
    ) -> None:
        self._device_id = config.device_id
        self._boot_id = boot_id
        self._put = put
        self._downloads: set[str] = set()
        self._buffers = Buffers()
        self._keep: Callable[[MqttChunk], object | None] = lambda _chunk: None
        self.epoch = 0
        self._config = config
        self._context = context
        self._brokers = read_brokers(config.broker)
        self._places = BrokerChoice(self._brokers, longest_s=RECONNECT_MAX_S)
        self._choice = MqttVersionChoice()
        self._lock = threading.Lock()  # over which client is the link's
        self._stopped = False
        self._client = self._new_client()

    def keep_by(self, keep: Callable[[MqttChunk], object | None]) -> None:
        """Let chunks be worked off in the link's thread, where they are read.

        Args:
            keep: gives the event that is told of a chunk in its place; None where the chunk itself is to be.
        """
        self._keep = keep

    def _chunk(self, chunk: MqttChunk) -> None:
        if not is_chunk_topic(chunk.topic):
            self._put(MqttMessage(chunk.topic, bytes(chunk.payload)))
            chunk.release()
            return
        kept = self._keep(chunk)
        if kept is None:
            self._put(chunk)
            return
        chunk.release()
        self._put(kept)

    def _new_client(self) -> paho.Client:
        device_id = self._config.device_id
        tls = self._brokers.tls
        # Most brokers that know devices by their certificates take the certificate's name instead.
        own = client_id(device_id)
        version = self._choice.version
        client = _Client(
            self._chunk,
            self._buffers,
            client_id=own if tls else f"shoal-{own}",
            userdata=self.epoch,
            protocol=MQTTProtocolVersion(version),
            clean_session=None if version is MqttVersion.V5 else False,
        )
        client.max_queued_messages_set(QUEUE_LIMIT)
        client.reconnect_delay_set(self._choice.pause_s, RECONNECT_MAX_S)
        if self._brokers.user:
            client.username_pw_set(self._brokers.user, self._brokers.password)
        if tls:
            client.tls_set_context(self._context)
        will = encode(Presence(online=False, boot_id=self._boot_id))
        client.will_set(device_topic(device_id, DeviceTopic.PRESENCE), will, qos=1, retain=True)
        client.on_socket_open = _no_delay
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_message = lambda _client, _data, message: self._put(
            MqttMessage(message.topic, bytes(message.payload))
        )
        return client

    def start(self) -> None:
        """Connect in the background, and keep connecting."""
        self._start(self._client)

    def _start(self, client: paho.Client) -> None:
        self._aim(client)
        client.loop_start()

    def _aim(self, client: paho.Client) -> None:
        """Let its next connection be made to the place whose turn it is."""
        if client.protocol == MQTTProtocolVersion.MQTTv5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = SESSION_EXPIRY_S
            client.connect_async(*self._places.place, keepalive=KEEPALIVE_S, clean_start=False, properties=properties)
        else:
            client.connect_async(*self._places.place, keepalive=KEEPALIVE_S)

    def _go_on(self, client: paho.Client) -> None:
        """No connection was made, or it ended; called from the client's thread, which connects anew after a pause."""
        if self._stopped or client is not self._client:
            return
        if self._places.ended():
            client.reconnect_delay_set(max(self._places.pause_s, self._choice.pause_s), RECONNECT_MAX_S)
            self._aim(client)

    def stop(self) -> None:
        """Say goodbye and disconnect."""
        with self._lock:
            self._stopped = True
            client = self._client
        if client.is_connected():
            said = self.publish(
                DeviceTopic.PRESENCE, encode(Presence(online=False, boot_id=self._boot_id)), retain=True
            )
            if said is not None:
                said.wait_for_publish(2)
        client.disconnect()
        client.loop_stop()

    def reconnect(self) -> None:
        """End the connection in order and make a new one, with what the context holds by now."""
        with self._lock:
            self.epoch += 1
            old, self._client = self._client, self._new_client()  # the library does not close all of one started again
        old.disconnect()
        old.loop_stop()
        self.start()

    def _fall_back(self, old: paho.Client) -> None:
        """Connect by the version that is chosen by now; called from the old client's thread, which then ends."""
        with self._lock:
            if self._stopped or old is not self._client:
                return
            self._client = self._new_client()
            self._start(self._client)
        old.loop_stop()

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted the connection."""
        return self._client.is_connected()

    def publish(self, leaf: DeviceTopic, payload: bytes, *, retain: bool = False) -> paho.MQTTMessageInfo | None:
        """Send on one of the device's own topics at QoS 1; None when not connected (everything is said again then)."""
        if not self._client.is_connected():
            return None
        return self._client.publish(device_topic(self._device_id, leaf), payload, qos=1, retain=retain)

    def say_need(self, need: Need) -> None:
        """Tell the server what is missing of a content."""
        self.publish(DeviceTopic.NEED, encode(need))

    def listen_to_broadcast(self, digest: str) -> None:
        """Receive an artifact's chunks; QoS 0, for what is lost is asked for again."""
        self._downloads.add(digest)
        if self._client.is_connected():
            self._client.subscribe(broadcast_filter(digest), qos=0)

    def stop_listening(self, digest: str) -> None:
        """Receive an artifact's chunks no more."""
        self._downloads.discard(digest)
        if not self._downloads:
            self._buffers.drop()
        if self._client.is_connected():
            self._client.unsubscribe(broadcast_filter(digest))

    def _on_connect(self, client: paho.Client, epoch: int, _flags: Any, reason: Any, _properties: Any) -> None:
        if client is not self._client:
            return
        if reason.value == UNSUPPORTED:
            if self._choice.refused():
                self._fall_back(client)
            return
        if self._choice.answered() and self._choice.version is MqttVersion.V3_1_1:
            log.info("the broker does not speak MQTT 5: connected by 3.1.1")
        if reason.is_failure:
            log.warning("the broker refused the connection: %s", reason)
            return
        self._places.accepted()
        client.reconnect_delay_set(self._choice.pause_s, RECONNECT_MAX_S)
        qos = self._choice.version.qos
        own = [(device_topic(self._device_id, leaf), qos) for leaf in sorted(TO_DEVICE)]
        client.subscribe([*own, (repair_filter(self._device_id), qos)])
        for digest in list(self._downloads):
            client.subscribe(broadcast_filter(digest), qos=0)
        self._put(LinkUp(epoch))

    def _on_disconnect(self, client: paho.Client, _data: Any, _flags: Any, _reason: Any, _properties: Any) -> None:
        if client is self._client and self._choice.closed():
            log.debug("the broker ends connections before it answers; trying MQTT %s", self._choice.version.label)
            self._fall_back(client)
        else:
            self._go_on(client)

    def _on_connect_fail(self, client: paho.Client, _data: Any) -> None:
        self._go_on(client)


class _Client(paho.Client):
    """The library's client, but for how it reads large messages: see `agent.packets`.

    It relies on names of the library's own, which a test holds: `_packet_read`, `_sock_recv`, `_in_packet` and others.
    The library's callbacks for messages are not called for large ones: these go to `put`.
    """

    def __init__(self, put: Callable[[MqttChunk], None], buffers: Buffers, **options: Any) -> None:
        super().__init__(CallbackAPIVersion.VERSION2, **options)
        self._put_chunk = put
        self._buffers = buffers
        self._read_from: Any = None  # the socket that the reader reads
        self._reader = PacketReader(buffers, five=False)

    def loop_forever(self, *given: Any, **options: Any) -> MQTTErrorCode:
        """As the library's, which `loop_start` calls in a thread, but for how long it waits."""
        return super().loop_forever(*given, **{"timeout": LOOK_S, **options})

    def _packet_read(self) -> MQTTErrorCode:
        """Read what there is. What was read ahead is worked off at once: no `select` would tell of it later."""
        if self._sock is not self._read_from:
            self._read_from = self._sock
            self._reader = PacketReader(self._buffers, five=self.protocol == MQTTProtocolVersion.MQTTv5)
        while True:
            code = self._read_one()
            if code != MQTTErrorCode.MQTT_ERR_SUCCESS or not self._reader.holds or self._sock is not self._read_from:
                return code

    def _read_one(self) -> MQTTErrorCode:
        try:
            if self._in_packet["command"] or not self._reader.begins(self._receive):
                return super()._packet_read()
            message = self._reader.read(self._receive)
        except BlockingIOError:
            return MQTTErrorCode.MQTT_ERR_AGAIN
        except (EOFError, OSError) as error:
            log.debug("the connection ended: %s", error)
            return MQTTErrorCode.MQTT_ERR_CONN_LOST
        except MalformedPacketError as error:
            log.warning("the broker sent a packet that can't be read: %s", error)
            return MQTTErrorCode.MQTT_ERR_PROTOCOL
        self._put_chunk(MqttChunk(message.topic, message.payload, message.buffer, self._buffers))
        return MQTTErrorCode.MQTT_ERR_SUCCESS if message.message_id is None else self._send_puback(message.message_id)

    def _receive(self, view: memoryview) -> int:
        sock = self._sock
        if sock is None:
            raise EOFError
        try:
            count = int(sock.recv_into(view))  # type: ignore[attr-defined]
        except ssl.SSLWantReadError:
            raise BlockingIOError from None
        except ssl.SSLWantWriteError:
            self._call_socket_register_write()
            raise BlockingIOError from None
        with self._msgtime_mutex:
            self._last_bytes_received = time.monotonic()
        return count

    def _sock_recv(self, bufsize: int) -> bytes:
        return self._reader.take(bufsize) if self._reader.holds else super()._sock_recv(bufsize)


def _no_delay(_client: Any, _data: Any, sock: Any) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
