"""Which spans a message of the outbox stands for: those of the deployments that it brings, where they are traced."""

from __future__ import annotations

import msgspec

from agent.protocol.errors import WireError
from agent.protocol.topics import DeviceTopic, parse_device_topic
from fleet_server.outbox import PendingMessage
from fleet_server.rollouts.tracing import published
from fleet_server.spans import Span


class _Deployment(msgspec.Struct):
    deployment_id: str
    traceparent: str = ""


class _Desired(msgspec.Struct):
    """What is read of a desired state, and no more: manifests are large."""

    deployments: tuple[_Deployment, ...] = ()


_decoder = msgspec.json.Decoder(_Desired)


def spans_of(message: PendingMessage, started_at: float) -> list[Span]:
    """The spans of a message that the broker has acknowledged just now.

    Args:
        message: of the server's own outbox.
        started_at: when it was handed to the broker, in Unix seconds.
    """
    if not message.retain or not message.payload:
        return []
    try:
        topic = parse_device_topic(message.topic)
        if topic.leaf is not DeviceTopic.DESIRED:
            return []
        desired = _decoder.decode(message.payload)
    except (WireError, msgspec.MsgspecError):
        return []
    traced = [(one.deployment_id, one.traceparent) for one in desired.deployments if one.traceparent]
    return published(traced, topic.device_id, started_at)
