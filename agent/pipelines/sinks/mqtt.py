"""Messages to a broker at QoS 1: taken when the broker has said so."""

from __future__ import annotations

import time
from collections.abc import Sequence

import paho.mqtt.client as paho

from agent.pipelines.broker import connect, new_client, place
from agent.pipelines.config import MqttSink
from agent.pipelines.outbox import Kept
from agent.pipelines.sinks.sink import SinkError


class Mqtt:
    """The sink.

    Args:
        config: of it.
        identity: names its session at the broker.
    """

    batch = 20

    def __init__(self, config: MqttSink, identity: str) -> None:
        self._config, self._identity = config, identity
        self._client: paho.Client | None = None

    def send(self, events: Sequence[Kept]) -> None:
        """Publish, and wait until the broker has acknowledged them all."""
        client = self._connected()
        said = [client.publish(self._config.topic, one.body, qos=1) for one in events]
        until = time.monotonic() + self._config.away_s
        for one in said:
            try:
                one.wait_for_publish(max(until - time.monotonic(), 0.001))
            except (ValueError, RuntimeError) as error:
                self.close()
                raise SinkError(f"{place(self._config.url)} takes nothing: {error}") from None
            if not one.is_published():
                self.close()  # what it has in flight would be sent twice
                raise SinkError(f"{place(self._config.url)} acknowledged nothing for {self._config.away_s:g} s")

    def close(self) -> None:
        """End the connection."""
        if self._client is not None:
            self._client.disconnect()
            self._client.loop_stop()
            self._client = None

    def _connected(self) -> paho.Client:
        if self._client is None:
            try:
                client = new_client(self._config.url, self._config.ca_file, self._identity)
            except OSError as error:
                raise SinkError(f"the certificates of `ca_file` can't be read: {error}") from None
            self._client = client
            connect(client, self._config.url)
        until = time.monotonic() + self._config.away_s
        while not self._client.is_connected():
            if time.monotonic() > until:
                self.close()
                raise SinkError(f"the broker {place(self._config.url)} is away, or refuses the connection")
            time.sleep(0.05)
        return self._client
