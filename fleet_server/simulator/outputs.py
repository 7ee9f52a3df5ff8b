"""What a simulated device wants done: pure values, carried out by the runner in their order."""

from __future__ import annotations

from dataclasses import dataclass

from agent.protocol.codec import Message
from agent.protocol.topics import DeviceTopic


@dataclass(frozen=True, slots=True)
class Say:
    """Publish below the device's own topic; lost while there is no connection, as the agent's words are."""

    leaf: DeviceTopic
    message: Message | bytes
    retain: bool = False


@dataclass(frozen=True, slots=True)
class Listen:
    """Receive the broadcasts of a content, or no more."""

    digest: str
    on: bool


@dataclass(frozen=True, slots=True)
class Connect:
    """Connect to the broker.

    Attributes:
        boot_id: for the will.
        anew: the device has started anew: what the connection before did not get rid of is gone.
    """

    boot_id: str
    anew: bool = False


@dataclass(frozen=True, slots=True)
class Cut:
    """The connection breaks, without a goodbye."""


Output = Say | Listen | Connect | Cut
