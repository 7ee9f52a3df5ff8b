"""Messages of samples: what a device may keep of what it was asked, and how the server gets it when somebody asks.

Nothing is kept unless the device's own configuration allows it and the server wants it.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from agent.protocol.delivery import DeliveryPolicy, Waiting
from agent.protocol.limits import MIB

FEATURE = "samples"  # of agents that know them
LISTING = "samples.json"  # in a file of samples


class Sampling(msgspec.Struct, frozen=True):
    """What is to be kept of one model's requests: a bounded choice of those it was least sure of.

    Attributes:
        model: its name.
        samples: how many rows at most.
        bytes: of all of them together.
        sample_bytes: of one; a row that is larger is not kept.
        days: how long one is kept.
        below: only rows whose confidence is below, 0 to 1.
    """

    model: str
    samples: int = 100
    bytes: int = 16 * MIB
    sample_bytes: int = MIB
    days: float = 7.0
    below: float = 0.6


class SampleRequest(msgspec.Struct, frozen=True):
    """The device is to send what it has kept of a model.

    Attributes:
        upload_id: the server's id; the same id is the same upload, however often it is sent.
        model: its name.
        samples: how many rows at most, the least sure ones first.
        bytes: of the file that holds them.
        delivery: rates and budgets that it keeps to.
    """

    upload_id: str
    model: str
    samples: int
    bytes: int
    delivery: DeliveryPolicy = DeliveryPolicy()


class UploadPhase(StrEnum):
    """Where an upload of samples is on its device."""

    PENDING = "pending"
    SENDING = "sending"
    DONE = "done"  # the server has it, or there was nothing to send
    FAILED = "failed"


class UploadReport(msgspec.Struct, frozen=True):
    """One upload as the device sees it.

    Attributes:
        upload_id: as asked.
        phase: where it is.
        samples: rows that its file holds.
        bytes: of its file.
        sent_bytes: that the server has confirmed.
        reason: why it has none, or failed: `not_allowed`, `off`, `none_kept`, `store_error`, `refused`. A text, so
            that an older server takes those it does not know.
        detail: the same for people, with what would mend it.
        waiting: what it waits for, when it stands still on purpose; None otherwise.
    """

    upload_id: str
    phase: UploadPhase
    samples: int = 0
    bytes: int = 0
    sent_bytes: int = 0
    reason: str = ""
    detail: str = ""
    waiting: Waiting | None = None


class SamplesReport(msgspec.Struct, frozen=True):
    """What a device keeps.

    Attributes:
        allowed: whether its configuration allows it to keep anything.
        models: of which it keeps samples.
        kept: how many there are now.
        bytes: that they take.
        uploads: what became of what it was asked for.
    """

    allowed: bool
    models: tuple[str, ...] = ()
    kept: int = 0
    bytes: int = 0
    uploads: tuple[UploadReport, ...] = ()


class TensorLine(msgspec.Struct, frozen=True):
    """One tensor in the listing of a file of samples."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class SampleLine(msgspec.Struct, frozen=True):
    """One sample in the listing. Its tensors are `{n}/in/{name}.npy` and `{n}/out/{name}.npy`, it being the n-th.

    Attributes:
        model: its name.
        version: its version.
        digest: of the artifact that answered.
        at: when, in Unix seconds by the device's clock.
        confidence: of the answer, 0 to 1.
        inputs: what was asked.
        outputs: what was answered.
    """

    model: str
    version: str
    digest: str
    at: float
    confidence: float
    inputs: tuple[TensorLine, ...]
    outputs: tuple[TensorLine, ...]


class SamplePiece(msgspec.Struct, frozen=True):
    """A piece of an upload's file. Answered by a `SampleAck`.

    Attributes:
        upload_id: as asked.
        digest: SHA-256 of the whole file.
        size: of the whole file, in bytes.
        offset: where the piece begins.
        data: at most `LIMITS.sample_piece_bytes`.
    """

    upload_id: str
    digest: str
    size: int
    offset: int
    data: bytes


class SampleAck(msgspec.Struct, frozen=True):
    """How much of an upload's file the server has: it takes the pieces in order.

    Attributes:
        upload_id: as asked.
        digest: of the file that it has a part of.
        received: bytes from the first one on.
        stored: the whole file is there for good; the device may forget it.
        refused: why the file is not taken; empty when it is.
    """

    upload_id: str
    digest: str
    received: int
    stored: bool = False
    refused: str = ""
