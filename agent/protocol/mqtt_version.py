"""Which version of MQTT a connection speaks: 5, or 3.1.1 where the broker has no other. Pure; both sides decide by it.

A broker that does not know MQTT 5 says so in its CONNACK (MQTT 3.1.1, section 3.1.2.2), or ends the connection without
one. The latter may have other causes, so it is only a reason to try the other version, with growing pauses.
"""

from __future__ import annotations

from enum import IntEnum

UNSUPPORTED = 0x84
"""Reason code of a CONNACK: unsupported protocol version (MQTT 5, section 3.2.2.2)."""
CLOSES = 2
PAUSE_MAX_S = 30


class MqttVersion(IntEnum):
    """Versions by the protocol level that CONNECT carries."""

    V3_1_1 = 4
    V5 = 5

    @property
    def qos(self) -> int:
        """At which quality of service devices and servers subscribe.

        A broker with 3.1.1 alone keeps a session, and what waits in it, for ever. NATS makes a JetStream consumer of
        each subscription at 1, in a cluster a Raft group: a thousand devices would have ten thousand. So it is 0 there:
        what was said while there was no connection is said again, or asked for, at the next one.
        """
        return 1 if self is MqttVersion.V5 else 0

    @property
    def label(self) -> str:
        """As people write it."""
        return "5" if self is MqttVersion.V5 else "3.1.1"


class MqttVersionChoice:
    """What one connection to one broker has found out; it holds for the run.

    Attributes:
        version: to connect by.
        pause_s: seconds to wait at least before it is connected by that version again.
    """

    def __init__(self) -> None:
        self.version = MqttVersion.V5
        self.pause_s = 1
        self._answered = False
        self._refused = False
        self._closes = 0

    def answered(self) -> bool:
        """The broker has answered by a CONNACK that does not refuse the version; returns whether that is news."""
        first, self._answered = not self._answered, True
        self.pause_s = 1
        return first

    def refused(self) -> bool:
        """The broker does not know the version; returns whether to connect by another now."""
        if self.version is MqttVersion.V3_1_1:
            return False
        self.version = MqttVersion.V3_1_1
        self._refused, self._answered = True, False
        return True

    def closed(self) -> bool:
        """The connection has ended; returns whether to connect by another version now.

        It is so after two that ended before any CONNACK came.
        """
        if self._answered or self._refused:
            return False
        self._closes += 1
        if self._closes < CLOSES:
            return False
        self._closes = 0
        self.version = MqttVersion.V5 if self.version is MqttVersion.V3_1_1 else MqttVersion.V3_1_1
        self.pause_s = min(self.pause_s * 2, PAUSE_MAX_S)
        return True
