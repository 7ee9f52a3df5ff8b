"""Topics below `shoal/v1`: how they are built and read. Nothing else in the code spells a topic.

`{shard}` is a stable hash of the device id, so that several servers can share the devices of a fleet by
subscribing to the shards they hold. A device may publish only below its own `d/{id}`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from zlib import crc32

from agent.protocol.errors import WireError, WireErrorCode
from agent.protocol.limits import LIMITS

ROOT = "shoal/v1"
SHARDS = 64
KNOWN_TOPICS = 16_384

DEVICE_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
DIGEST = re.compile(r"^[0-9a-f]{64}\Z")
DEVICE_HOST = "device.shoal.invalid"  # the DNS name in every device's certificate: of no real host (RFC 2606)
PEER_PATH = "/shoal/v1/artifacts/"  # of HTTP, where a device serves artifacts to its peers
TRUST_FILE = re.compile(r"^[A-Za-z0-9._%-]{1,200}\.json\Z")


class DeviceTopic(StrEnum):
    """The last part, or the last two, of a device's own topics."""

    DESIRED = "desired"
    REPORTED = "reported"
    PRESENCE = "presence"
    TELEMETRY = "telemetry"
    TELEMETRY_ACK = "telemetry-ack"
    NEED = "need"
    RENEW = "renew"
    CERTIFICATE = "certificate"
    TRUST_NEED = "trust-need"
    TRUST = "trust"
    SOURCE_NEED = "source-need"
    SOURCE = "source"
    SAMPLES = "samples"
    SAMPLES_ACK = "samples-ack"
    COMMAND = "rpc/command"
    COMMAND_ANSWER = "rpc/answer"
    INFER = "infer"
    INFERRED = "inferred"


FROM_DEVICE = frozenset(
    {
        DeviceTopic.REPORTED,
        DeviceTopic.PRESENCE,
        DeviceTopic.TELEMETRY,
        DeviceTopic.NEED,
        DeviceTopic.RENEW,
        DeviceTopic.TRUST_NEED,
        DeviceTopic.SOURCE_NEED,
        DeviceTopic.SAMPLES,
        DeviceTopic.COMMAND_ANSWER,
        DeviceTopic.INFERRED,
    },
)
TO_DEVICE = frozenset(DeviceTopic) - FROM_DEVICE


def check_device_id(device_id: str) -> str:
    """Return the id unchanged.

    Raises:
        ValueError: when it could not stand in a topic or a file name.
    """
    if not DEVICE_ID.match(device_id):
        raise ValueError(
            f"device id {device_id!r} is not usable: 1 to 64 letters, digits, '.', '_' or '-', "
            "starting with a letter or digit",
        )
    return device_id


def check_digest(digest: str) -> str:
    """Return the SHA-256 digest unchanged.

    Raises:
        ValueError: when it is not 64 lower-case hexadecimal digits.
    """
    if not DIGEST.match(digest):
        raise ValueError(f"{digest[:80]!r} is not a SHA-256 digest (64 lower-case hexadecimal digits)")
    return digest


def shard_of(device_id: str) -> int:
    """The shard of a device, 0 to 63: CRC-32 of the id modulo 64, the same on every machine."""
    return crc32(device_id.encode()) % SHARDS


def shard_of_topic(topic: str) -> int:
    """The shard that a topic's messages are counted to: a device's own, or one for each other topic."""
    parts = topic.split("/", 4)
    named = parts[2] if len(parts) == 5 and parts[3] == "d" else ""
    if named.isascii() and named.isdigit() and len(named) <= 2 and int(named) < SHARDS:
        return int(named)
    return crc32(topic.encode()) % SHARDS


def shard_of_digest(digest: str) -> int:
    """The shard whose server sends a content, to devices of every shard: what all need is sent once."""
    return int(digest[:8], 16) % SHARDS


def device_topic(device_id: str, leaf: DeviceTopic) -> str:
    """`shoal/v1/{shard}/d/{id}/{leaf}`."""
    return f"{ROOT}/{shard_of(device_id)}/d/{device_id}/{leaf.value}"


def alerts_topic(fleet_id: str) -> str:
    """Where the server tells of a fleet's alerts, to whom it may concern: no device speaks or listens there."""
    return f"{ROOT}/alerts/{fleet_id}"


def repair_topic(device_id: str, digest: str, chunk: int) -> str:
    """Where a chunk is sent to one device."""
    return f"{ROOT}/{shard_of(device_id)}/d/{device_id}/b/{digest}/{chunk}"


def repair_filter(device_id: str) -> str:
    """What a device subscribes to for the chunks sent to it alone."""
    return f"{ROOT}/{shard_of(device_id)}/d/{device_id}/b/+/+"


def broadcast_topic(digest: str, *chunks: int) -> str:
    """Where a chunk, or the exclusive-or of several, is published once for every device that needs it."""
    return f"{ROOT}/b/{digest}/{'-'.join(map(str, chunks))}"


def broadcast_filter(digest: str) -> str:
    """What a device subscribes to while it downloads `digest`."""
    return f"{ROOT}/b/{digest}/+"


def shard_filter(shard: int, leaf: DeviceTopic) -> str:
    """What a server subscribes to for one kind of message of the devices of a shard."""
    return f"{ROOT}/{shard}/d/+/{leaf.value}"


def every_shard_filter(leaf: DeviceTopic) -> str:
    """What a server that holds every shard subscribes to."""
    return f"{ROOT}/+/d/+/{leaf.value}"


def client_id(device_id: str) -> str:
    """Under which a device connects: its id, with a colon for each dot, which NATS takes in no client id.

    Two devices never share one, for no device id has a colon.
    """
    return device_id.replace(".", ":")


@dataclass(frozen=True)
class ParsedDeviceTopic:
    """A message's sender and kind, as its topic says them."""

    device_id: str
    leaf: DeviceTopic


@dataclass(frozen=True)
class ParsedChunkTopic:
    """A chunk's digest and index, and the device it was repaired for, if it was not broadcast.

    Attributes:
        others: chunks that it is combined with by exclusive-or.
    """

    digest: str
    chunk: int
    device_id: str | None
    others: tuple[int, ...] = ()


@lru_cache(maxsize=KNOWN_TOPICS)
def parse_device_topic(topic: str) -> ParsedDeviceTopic:
    """Read a device's topic; those that were read before are known.

    Raises:
        WireError: `malformed` when it is none, `wrong_device` when the shard is not the device's.
    """
    parts = topic.split("/", 5)
    if len(parts) != 6 or parts[:2] != ["shoal", "v1"] or parts[3] != "d" or not DEVICE_ID.match(parts[4]):
        raise WireError(WireErrorCode.MALFORMED, f"not a device topic: {topic[:200]!r}")
    try:
        leaf = DeviceTopic(parts[5])
    except ValueError:
        raise WireError(WireErrorCode.UNKNOWN_MESSAGE, f"unknown kind of message: {topic[:200]!r}") from None
    if parts[2] != str(shard_of(parts[4])):
        raise WireError(WireErrorCode.WRONG_DEVICE, f"shard {parts[2]!r} is not that of device {parts[4]!r}")
    return ParsedDeviceTopic(device_id=parts[4], leaf=leaf)


def is_chunk_topic(topic: str) -> bool:
    """Whether a chunk is published there, by its place alone: a device may be called `b`, too."""
    parts = topic.split("/", 6)
    return parts[2:3] == ["b"] or parts[5:6] == ["b"]


def parse_chunk_topic(topic: str) -> ParsedChunkTopic:
    """Read the topic of a broadcast or repair chunk.

    Raises:
        WireError: `malformed` when it is neither.
    """
    parts = topic.split("/")
    device_id = None
    if len(parts) == 8 and parts[:2] == ["shoal", "v1"] and parts[3] == "d" and parts[5] == "b":
        device_id, digest, index = parts[4], parts[6], parts[7]
    elif len(parts) == 5 and parts[:3] == ["shoal", "v1", "b"]:
        digest, index = parts[3], parts[4]
    else:
        raise WireError(WireErrorCode.MALFORMED, f"not a chunk topic: {topic[:200]!r}")
    numbers = index.split("-", LIMITS.combined_chunks)
    if not DIGEST.match(digest) or len(numbers) > LIMITS.combined_chunks or not all(map(_is_chunk, numbers)):
        raise WireError(WireErrorCode.MALFORMED, f"not a chunk topic: {topic[:200]!r}")
    first, *others = map(int, numbers)
    return ParsedChunkTopic(digest=digest, chunk=first, device_id=device_id, others=tuple(others))


def _is_chunk(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9
