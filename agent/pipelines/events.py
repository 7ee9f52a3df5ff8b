"""Results as CloudEvents 1.0, and which are published. Pure."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from agent.pipelines.config import Only
from agent.pipelines.items import Answer, Item

TYPE = "shoal.inference"
CONTENT_TYPE = "application/cloudevents+json"
BATCH_TYPE = "application/cloudevents-batch+json"


def event_id(device_id: str, pipeline: str, item: Item) -> str:
    """An id that no other result has: the same again for an item that has a name."""
    if not item.name:
        return uuid.uuid4().hex
    return hashlib.sha256(f"{device_id}\n{pipeline}\n{item.name}".encode(errors="replace")).hexdigest()[:32]


def event(device_id: str, pipeline: str, item: Item, answer: Answer) -> tuple[str, bytes]:
    """The id and the JSON of a result."""
    identity = event_id(device_id, pipeline, item)
    body = {
        "specversion": "1.0",
        "id": identity,
        "source": f"shoal/device/{device_id}/pipelines/{pipeline}",
        "type": TYPE,
        "time": datetime.fromtimestamp(item.taken_at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "datacontenttype": "application/json",
        "data": {
            "model": answer.model,
            "version": answer.version,
            "item": dict(item.about),
            "outputs": answer.outputs,
        },
    }
    return identity, msgspec.json.encode(body)


def is_wanted(only: Only, outputs: Sequence[dict[str, Any]]) -> bool:
    """Whether an answer is to be published.

    A condition on an output that the answer does not have does not count. Where it has labels and scores, one for
    one, the label that is looked for must have the score itself.
    """
    data = {str(one.get("name")): one.get("data") for one in outputs}
    labels = data.get("labels") if only.labels else None
    scores = data.get(only.output) if only.score is not None else None
    labels = list(labels) if isinstance(labels, list) else None
    numbers = list(_numbers(scores)) if isinstance(scores, list) else None
    least = only.score if only.score is not None else 0.0
    if labels is not None and numbers is not None and len(labels) == len(numbers):
        pairs = zip(labels, numbers, strict=True)
        return any(label in only.labels and number >= least for label, number in pairs)
    found = labels is None or any(label in only.labels for label in labels)
    return found and (numbers is None or any(number >= least for number in numbers))


def _numbers(values: Iterable[Any]) -> Iterable[float]:
    """Numbers of a list of lists; what is none is below all."""
    for value in values:
        if isinstance(value, list):
            yield from _numbers(value)
        else:
            yield float(value) if isinstance(value, int | float) else float("-inf")


def batch(bodies: Sequence[bytes]) -> bytes:
    """Several events as one JSON array."""
    return b"[" + b",".join(bodies) + b"]"
