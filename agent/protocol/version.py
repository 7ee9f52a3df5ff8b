"""Protocol versions: what this build speaks, and what to do when two sides do not fit."""

from __future__ import annotations

import msgspec

from agent.protocol.errors import WireError, WireErrorCode

CURRENT = 1
OLDEST = 1


class ProtocolRange(msgspec.Struct, frozen=True):
    """The protocol versions one side speaks, stated in every message that opens a conversation.

    Attributes:
        current: the version the sender writes.
        oldest: the oldest version the sender still reads.
    """

    current: int
    oldest: int


SPOKEN = ProtocolRange(current=CURRENT, oldest=OLDEST)


def check_peer(peer: ProtocolRange, *, peer_name: str) -> None:
    """Refuse a peer whose versions do not overlap with ours.

    Raises:
        WireError: with code `protocol_mismatch`, naming which side must be upgraded.
    """
    if peer.current < OLDEST:
        raise WireError(
            WireErrorCode.PROTOCOL_MISMATCH,
            f"{peer_name} speaks protocol {peer.current}, this side needs at least {OLDEST}: upgrade {peer_name}",
        )
    if peer.oldest > CURRENT:
        raise WireError(
            WireErrorCode.PROTOCOL_MISMATCH,
            f"{peer_name} needs protocol {peer.oldest} or newer, this side speaks {CURRENT}: upgrade this side",
        )
