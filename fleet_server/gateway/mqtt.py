"""The server's MQTT link: the one import of MQTT here. Callbacks only enqueue; nothing waits inside them.

MQTT 5, or 3.1.1 where the broker has no other, with a session that outlives the connection. The library reconnects by
itself with a growing delay. A client of paho has one version for life, so another version is another client: a callback
may make it and start it, for neither waits.
"""

from __future__ import annotations

import logging
import queue
import socket
import ssl
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from agent.protocol.brokers import BrokerAddresses, BrokerChoice, read_brokers
from agent.protocol.mqtt_version import UNSUPPORTED, MqttVersion, MqttVersionChoice
from fleet_server.errors import InvalidError
from fleet_server.gateway.inbox import Message

log = logging.getLogger(__name__)
SESSION_EXPIRY_S = 3600
IN_FLIGHT = 200
RECONNECT_MAX_S = 30
KEEPALIVE_S = 20
NOT_AUTHORIZED = 0x87


class MqttLink:
    """One connection to the broker.

    Args:
        url: `mqtt://[user:password@]host:port` or `mqtts://…`; of a cluster several by commas, tried in that order.
        client_id: of the session.
        filters: subscribed at every connect, QoS 1, until others are wanted (`want`).
        put: takes what comes in; called from the link's thread, must not block.
        context: certificates for `mqtts://`; the system's, and none of our own, when absent.
        possible: filters that an earlier run may have left in the session; they go where they are not wanted.

    Attributes:
        forgotten: how often a connection was made to a broker that had kept nothing of what was said meanwhile.
    """

    def __init__(
        self,
        url: str,
        client_id: str,
        filters: Sequence[str],
        put: Callable[[Message], None],
        context: ssl.SSLContext | None = None,
        possible: Collection[str] = (),
    ) -> None:
        self._brokers = _brokers(url)
        self._places = BrokerChoice(self._brokers, longest_s=RECONNECT_MAX_S)
        self._client_id = client_id
        self._context = context
        self._filters = set(filters)
        self._possible = frozenset(possible)
        self._more: set[str] = set()
        self._asked = self._answered = 0  # subscriptions of this connection
        self.forgotten = 0
        self._put = put
        self._slots = threading.BoundedSemaphore(IN_FLIGHT)
        self._waiting: dict[int, Callable[[], None] | None] = {}
        self._early: set[int] = set()
        self._lock = threading.Lock()
        self._choice = MqttVersionChoice()
        self._stopped = False
        self._client = self._new_client()

    def _new_client(self) -> paho.Client:
        client = _client(self._client_id, self._choice.version)
        client.max_queued_messages_set(0)
        client.max_inflight_messages_set(IN_FLIGHT)
        client.reconnect_delay_set(self._choice.pause_s, RECONNECT_MAX_S)
        if self._brokers.user:
            client.username_pw_set(self._brokers.user, self._brokers.password)
        if self._brokers.tls:
            client.tls_set_context(self._context)
        client.on_socket_open = _no_delay
        client.on_connect = self._on_connect
        client.on_connect_fail = lambda failed, _data: self._go_on(failed)
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
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
        """Disconnect in order."""
        with self._lock:
            self._stopped = True
        self._client.disconnect()
        self._client.loop_stop()

    def _fall_back(self, old: paho.Client) -> None:
        """Connect by the version that is chosen by now; called from the old client's thread, which then ends."""
        with self._lock:
            if self._stopped or old is not self._client:
                return
            lost = len(self._waiting)  # what an earlier broker never acknowledged: it is said again
            self._waiting.clear()
            self._early.clear()
            self._client = self._new_client()
            self._start(self._client)
        for _ in range(lost):
            self._slots.release()
        old.loop_stop()

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted the connection."""
        return self._client.is_connected()

    def publish(
        self, topic: str, payload: bytes, *, retain: bool = False, acknowledged: Callable[[], None] | None = None
    ) -> bool:
        """Send at QoS 1, when there is room in flight and a connection.

        By 3.1.1, where nobody subscribes at 1, what the device asks for again when it is lost is sent at 0: a NATS
        cluster would write each chunk to three disks.

        Args:
            topic: where to.
            payload: the bytes.
            retain: whether the broker keeps it for who subscribes later.
            acknowledged: called from the link's thread when the broker has the message; it must only enqueue.

        Returns:
            Whether it was handed over; when not, try again later.
        """
        if not self.connected or not self._slots.acquire(timeout=5):
            return False
        client = self._client
        qos = 1 if retain or acknowledged is not None else self._choice.version.qos
        info = client.publish(topic, payload, qos=qos, retain=retain)
        if info.rc not in {paho.MQTT_ERR_SUCCESS, paho.MQTT_ERR_NO_CONN}:
            self._slots.release()
            return False
        # The library holds a lock of its own while it calls `_on_publish`: ours is never held while calling it.
        with self._lock:
            if client is not self._client:  # replaced in between
                self._slots.release()
                return False
            early = info.mid in self._early
            self._early.discard(info.mid)
            if not early:
                self._waiting[info.mid] = acknowledged
        if early:
            self._settle(acknowledged)
        return True

    def listen(self, topic: str) -> None:
        """Subscribe to one more topic, now and at every connect."""
        with self._lock:
            if topic in self._more:
                return
            self._more.add(topic)
        self._subscribe([topic])

    def want(self, filters: Collection[str]) -> None:
        """Subscribe to these, and no more to others that were wanted before; now and at every connect."""
        with self._lock:
            more, less = set(filters) - self._filters, self._filters - set(filters)
            self._filters = set(filters)
        self._subscribe(sorted(more))
        if less and self.connected:
            self._client.unsubscribe(sorted(less))

    def hear_again(self, filters: Collection[str]) -> None:
        """Have the broker send what it keeps for these topics; they are not subscribed to any longer than that."""
        self._subscribe(sorted(filters))
        if filters and self.connected:
            self._client.unsubscribe(sorted(filters))

    @property
    def settled(self) -> bool:
        """Whether the broker has confirmed all that this connection subscribed to."""
        return self.connected and self._answered >= self._asked

    def _subscribe(self, filters: Sequence[str]) -> None:
        if not filters or not self.connected:
            return
        with self._lock:
            self._asked += 1
        code, _ = self._client.subscribe(self._with_qos(filters))
        if code != paho.MQTT_ERR_SUCCESS:  # the connection is gone: the next one subscribes to all
            with self._lock:
                self._asked -= 1

    def _with_qos(self, filters: Sequence[str]) -> list[tuple[str, int]]:
        return [(one, self._choice.version.qos) for one in filters]

    def _on_subscribe(self, client: paho.Client, _data: Any, _mid: Any, _reasons: Any, _properties: Any) -> None:
        if client is self._client:
            with self._lock:
                self._answered += 1

    def _on_connect(self, client: paho.Client, _data: Any, flags: Any, reason: Any, _properties: Any) -> None:
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
        with self._lock:
            wanted = sorted(self._filters | self._more)
            self._asked, self._answered = (1 if wanted else 0), 0
        if wanted:
            client.subscribe(self._with_qos(wanted))
        if not flags.session_present or self._choice.version.qos == 0:
            self.forgotten += 1
        left = sorted(self._possible.difference(wanted))
        if flags.session_present and left:
            client.unsubscribe(left)

    def _on_disconnect(self, client: paho.Client, _data: Any, _flags: Any, _reason: Any, _properties: Any) -> None:
        if client is self._client and self._choice.closed():
            log.debug("the broker ends connections before it answers; trying MQTT %s", self._choice.version.label)
            self._fall_back(client)
        else:
            self._go_on(client)

    def _on_message(self, _client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        self._put(Message(message.topic, bytes(message.payload), retained=message.retain))

    def _on_publish(self, client: paho.Client, _data: Any, mid: int, _reason: Any, _properties: Any) -> None:
        with self._lock:
            if client is not self._client:
                return
            if mid not in self._waiting:
                self._early.add(mid)  # acknowledged before `publish` had noted it
                return
            callback = self._waiting.pop(mid)
        self._settle(callback)

    def _settle(self, callback: Callable[[], None] | None) -> None:
        self._slots.release()
        if callback is not None:
            try:
                callback()
            except Exception:
                log.exception("noting an acknowledged message failed")


def end_session(url: str, client_id: str, context: ssl.SSLContext, timeout_s: float = 10.0) -> bool:
    """End whatever connection and session a client id has, by taking it over and leaving; says whether it is out.

    A broker that does not take the client any more has let it out already. Of a cluster, the first node that answers
    does it for all.

    Args:
        url: of the broker.
        client_id: whose; the context's certificate must be that device's.
        context: connects as that client.
        timeout_s: how long the broker may take.
    """
    for place in _brokers(url).places:
        answer = _take_over(place, client_id, context, MqttVersion.V5, timeout_s)
        if answer == UNSUPPORTED:
            answer = _take_over(place, client_id, context, MqttVersion.V3_1_1, timeout_s)
        if answer is not None:
            return answer in {0, NOT_AUTHORIZED}
    return False


def _take_over(
    place: tuple[str, int], client_id: str, context: ssl.SSLContext, version: MqttVersion, timeout_s: float
) -> int | None:
    """The reason code that the broker answers with; None when it does not."""
    outcome: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    client = _client(client_id, version, clean=True)
    client.tls_set_context(context)
    client.on_connect = lambda _client, _data, _flags, reason, _properties: outcome.put(reason.value)
    client.on_connect_fail = lambda _client, _data: outcome.put(None)
    client.connect_async(*place, keepalive=KEEPALIVE_S, clean_start=True)
    client.loop_start()
    try:
        return outcome.get(timeout=timeout_s)
    except queue.Empty:
        return None
    finally:
        client.disconnect()
        client.loop_stop()


def _client(client_id: str, version: MqttVersion, *, clean: bool = False) -> paho.Client:
    """One that keeps its session, or not; by MQTT 5 that is said when it connects."""
    return paho.Client(
        CallbackAPIVersion.VERSION2,
        client_id=client_id,
        protocol=MQTTProtocolVersion(version),
        clean_session=None if version is MqttVersion.V5 else clean,
    )


def _brokers(url: str) -> BrokerAddresses:
    try:
        return read_brokers(url)
    except ValueError as error:
        raise InvalidError("bad_broker_url", f"broker_url: {error}") from None


def _no_delay(_client: Any, _data: Any, sock: Any) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
