"""Bundles: artifacts, signed manifests and TUF metadata in one file, to be carried. How one is written and read: pure.

A bundle is a tar archive (POSIX ustar) of plain files in a fixed order: `index.json`, `metadata/0`, `metadata/1`, … as
the index lists them, then `artifacts/{digest}`. A copy may leave out artifacts. Names in it are never used as paths.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from agent.protocol.codec import check_manifest
from agent.protocol.errors import WireError, WireErrorCode
from agent.protocol.limits import LIMITS, MIB
from agent.protocol.manifest import Manifest
from agent.protocol.topics import DEVICE_ID, DIGEST, TRUST_FILE

FORMAT = 1
SUFFIX = ".shoal-bundle"
INDEX = "index.json"
BLOCK = 512
END = bytes(2 * BLOCK)
INDEX_BYTES = 8 * MIB
ENTRIES = 512  # manifests, metadata files, artifacts: of each
StructT = TypeVar("StructT", bound=msgspec.Struct)


class BundleOrder(msgspec.Struct, frozen=True):
    """What devices without a server are to run. Its JSON is what is signed, as the TUF target `bundles/{name}.json`.

    Attributes:
        name: of the order; a device follows the one that its configuration names.
        serial: grows by one with every change of the order.
        targets: TUF target paths of manifests, for each model one a profile. What else a device runs is taken off it.
        probation_s: how long a new version is watched before it counts as active, in seconds.
    """

    name: str
    serial: int
    targets: tuple[str, ...]
    probation_s: float = 5.0

    @property
    def target_path(self) -> str:
        """Under which it is signed."""
        return f"bundles/{self.name}.json"


class BundleFile(msgspec.Struct, frozen=True):
    """A file of TUF metadata, as TUF names it, and its bytes."""

    file: str
    size: int


class BundleArtifact(msgspec.Struct, frozen=True):
    """An artifact and its bytes."""

    digest: str
    size: int


class BundleIndex(msgspec.Struct, frozen=True):
    """What a bundle holds. It is not signed itself: what it says is checked against what is.

    Attributes:
        format: 1.
        fleet: whose it is.
        made_at: Unix seconds, by the clock of who made it.
        order: a `BundleOrder` as JSON, exactly the bytes that were signed.
        manifests: each a `Manifest` as JSON, exactly the bytes that were signed.
        metadata: TUF metadata that vouches for them.
        artifacts: whose digests the manifests name.
    """

    format: int
    fleet: str
    made_at: float
    order: msgspec.Raw
    manifests: tuple[msgspec.Raw, ...]
    metadata: tuple[BundleFile, ...]
    artifacts: tuple[BundleArtifact, ...]

    def read_order(self) -> BundleOrder:
        """The order, of an index that was checked."""
        return msgspec.json.decode(self.order, type=BundleOrder)

    def read_manifests(self) -> tuple[Manifest, ...]:
        """The manifests, of an index that was checked."""
        return tuple(msgspec.json.decode(one, type=Manifest) for one in self.manifests)


def read_order(data: bytes) -> BundleOrder:
    """Read an order.

    Raises:
        WireError: `malformed`.
    """
    order = _decode(data, BundleOrder)
    _require(DEVICE_ID.match(order.name) is not None, "order.name is not a name")
    _require(0 < order.serial < LIMITS.counter, "order.serial is out of bounds")
    _require(0 < len(order.targets) <= ENTRIES, "order.targets is empty or too long")
    _require(len(set(order.targets)) == len(order.targets), "order.targets names one twice")
    _require(all(len(one) <= 3 * LIMITS.name_chars for one in order.targets), "order.targets holds a long path")
    _require(0 <= order.probation_s <= LIMITS.seconds, "order.probation_s is out of bounds")
    return order


def read_index(data: bytes) -> BundleIndex:
    """Read an index: everything in it is within bounds, and its order and manifests fit together.

    Raises:
        WireError: `too_large` or `malformed`; never anything else, whatever the bytes.
    """
    if len(data) > INDEX_BYTES:
        raise WireError(WireErrorCode.TOO_LARGE, f"{INDEX} has {len(data)} bytes, at most {INDEX_BYTES} are read")
    index = _decode(data, BundleIndex)
    _require(index.format == FORMAT, f"format {index.format} is none that this version reads: upgrade the agent")
    _require(len(index.fleet) <= LIMITS.name_chars, "fleet is too long")
    _require(0 <= index.made_at <= LIMITS.unix_seconds, "made_at is out of bounds")
    for name in ("manifests", "metadata", "artifacts"):
        _require(len(getattr(index, name)) <= ENTRIES, f"{name} has too many entries")
    order = read_order(bytes(index.order))
    paths = {check_manifest(_decode(bytes(one), Manifest)).target_path for one in index.manifests}
    _require(paths == set(order.targets) and len(paths) == len(index.manifests), "manifests are not those of the order")
    for file in index.metadata:
        _require(TRUST_FILE.match(file.file) is not None, "metadata holds a file with another name")
        _require(0 < file.size <= LIMITS.trust_file_bytes, "metadata holds a file that is too large")
    for artifact in index.artifacts:
        _require(DIGEST.match(artifact.digest) is not None, "artifacts holds what is no digest")
        _require(0 < artifact.size <= LIMITS.artifact_bytes, "artifacts holds one that is too large")
    return index


def write_header(name: str, size: int, at: float) -> bytes:
    """The header of a file in the archive: 512 bytes before its own, which are filled up to whole blocks."""
    raw = name.encode("ascii")
    if len(raw) > 100 or not 0 <= size < 1 << 33:
        raise ValueError(name)
    fields = raw.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2
    fields += f"{size:011o}\0{int(at):011o}\0".encode()
    rest = b"0" + bytes(100) + b"ustar\x0000" + bytes(BLOCK - 265)
    total = sum(fields) + sum(rest) + 8 * ord(" ")
    return fields + f"{total:06o}\0 ".encode() + rest


def read_header(block: bytes) -> tuple[str, int] | None:
    """Name and size of the next file; None at the archive's end.

    Raises:
        WireError: `malformed`, also for anything that is no plain file.
    """
    _require(len(block) == BLOCK, "it is cut off")
    if not block.strip(b"\0"):
        return None
    total = sum(block[:148]) + 8 * ord(" ") + sum(block[156:])
    _require(_octal(block[148:156]) == total, "it is no tar archive, or damaged")
    _require(block[257:263] == b"ustar\0" and block[156:157] in {b"0", b"\0"}, "it holds more than plain files")
    name = block[:100].rstrip(b"\0")
    _require(name.isascii() and not block[345:500].strip(b"\0"), "it holds a long or strange name")
    return name.decode("ascii"), _octal(block[124:136])


def padding(size: int) -> int:
    """Bytes after a file of this size, up to the next header."""
    return -size % BLOCK


def _octal(field: bytes) -> int:
    digits = field.strip(b"\0 ")
    _require(0 < len(digits) <= 12 and not digits.strip(b"01234567"), "a header holds what is no octal number")
    return int(digits, 8)


def _decode(data: bytes, kind: type[StructT]) -> StructT:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(WireErrorCode.MALFORMED, f"{kind.__name__}: {str(error)[:300]}") from None


def _require(holds: bool, message: str) -> None:  # noqa: FBT001
    if not holds:
        raise WireError(WireErrorCode.MALFORMED, message)
