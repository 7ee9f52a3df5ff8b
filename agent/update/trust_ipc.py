"""What the supervisor and the verifying process say to each other, in the frames of `agent.serving.framing`."""

from __future__ import annotations

import msgspec

from agent.protocol.errors import WireErrorCode
from agent.protocol.messages import TrustPiece


class Target(msgspec.Struct, frozen=True):
    """A manifest, and the TUF target path under which it must have been signed."""

    path: str
    content: bytes


class CheckTargets(msgspec.Struct, frozen=True, tag="check"):
    """Bring the metadata up to date, then judge each job. The first and only order of a process.

    Attributes:
        folder: of the metadata.
        root: trusted root metadata that was configured; None where there is none.
        first_use: whether the root that comes first may be trusted where none is known.
        grace_s: how long expired metadata still counts, in seconds.
        jobs: what to judge, by a key of the supervisor's.
    """

    folder: str
    root: bytes | None
    first_use: bool
    grace_s: float
    jobs: dict[str, tuple[Target, ...]]


class Piece(msgspec.Struct, frozen=True, tag="piece"):
    """What the server answered; None when nothing came."""

    piece: TrustPiece | None


class Ask(msgspec.Struct, frozen=True, tag="ask"):
    """A piece of a metadata file is wanted. Answered by `Piece`."""

    file: str
    offset: int


class Verdict(msgspec.Struct, frozen=True, tag="verdict"):
    """Whether a job's targets are all trusted: `code` is None when they are."""

    key: str
    code: WireErrorCode | None = None
    detail: str = ""


class Later(msgspec.Struct, frozen=True, tag="later"):
    """Metadata could not be had: what has no verdict is to be tried again."""

    detail: str


ToTrust = CheckTargets | Piece
FromTrust = Ask | Verdict | Later
