"""Parts of inference requests: rows that the server asks one device to answer, and what the device says of them.

The body of a part is a request of the Open Inference Protocol v2 with binary tensors, as the local inference API takes
it, and that of an answer what the API gave. Neither side decodes tensors on the way.
"""

from __future__ import annotations

import msgspec

FEATURE = "infer"  # in the facts of a device that answers parts, and whose owner lets it


class Hop(msgspec.Struct, frozen=True):
    """One device on the way of a part.

    Attributes:
        device: its id.
        model: that it runs of the part.
        version: of the model; None for the one that serves.
        address: `host:port` of its local inference API on the LAN; None where it is reached by the server alone.
    """

    device: str
    model: str
    version: str | None = None
    address: str | None = None


class InferPart(msgspec.Struct, frozen=True):
    """Rows for a device. Answered by a `PartAnswer`; without one the server asks another device.

    Attributes:
        part_id: the server's id, which nobody can guess.
        attempt: grows by one each time that the same rows are sent, to whatever device.
        model: that answers.
        body: a request of the Open Inference Protocol v2.
        header_length: of the body's JSON, which binary tensors follow, in bytes.
        version: of the model; None for the one that serves.
        deadline_ms: how long an answer is of use, from when the part comes, in milliseconds.
        route: devices that the part passes after this one; empty where this one's answer is the answer.
    """

    part_id: str
    attempt: int
    model: str
    body: bytes
    header_length: int
    version: str | None = None
    deadline_ms: int = 60_000
    route: tuple[Hop, ...] = ()


class PartAnswer(msgspec.Struct, frozen=True):
    """What became of a part on a device.

    Attributes:
        part_id: as asked.
        attempt: as asked.
        status: as the local inference API said by HTTP: 200, or why there is no answer; 429 for a device that has
            enough to do, 413 for an answer that no message holds.
        header_length: of the body's JSON, which binary tensors follow, in bytes.
        body: a response of the Open Inference Protocol v2; empty where there is none.
        error: why there is no answer, in words.
        retry_after_s: when the device may be asked again, in seconds; 0 where it does not say.
        queue_s: how long the part waited on the device, in seconds.
        infer_s: how long the local inference API took, in seconds.
        waiting: parts that wait on the device.
        hops: of a part with a route, how long each device took, in seconds, in their order.
        route: devices that the part has yet to pass, where the server is to send it on; empty for an answer.
    """

    part_id: str
    attempt: int
    status: int
    header_length: int = 0
    body: bytes = b""
    error: str = ""
    retry_after_s: float = 0.0
    queue_s: float = 0.0
    infer_s: float = 0.0
    waiting: int = 0
    hops: tuple[float, ...] = ()
    route: tuple[Hop, ...] = ()
