"""Which lost chunks are repaired together: pure.

A chunk that few devices lost need not be sent alone. The exclusive-or of several chunks mends one for each device that
lacks just one of them and has the others: one message for all, where each lost another (index coding).
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from agent.protocol.limits import LIMITS


@dataclass
class Group:
    """Chunks that are repaired by one message.

    Attributes:
        chunks: in the order in which they were taken in.
        mends: the device's chunk, by device.
    """

    chunks: list[int] = field(default_factory=list)
    mends: dict[str, int] = field(default_factory=dict)


def group(lackers: Mapping[int, AbstractSet[str]], missing: Mapping[str, int]) -> list[Group]:
    """Put lost chunks into as few groups as a greedy search finds; those that most devices lack come first.

    Args:
        lackers: by chunk, which devices lost it.
        missing: by device, the chunks that it does not have, lost or not yet sent.
    """
    groups: list[Group] = []
    for chunk in sorted(lackers, key=lambda one: (-len(lackers[one]), one)):
        devices = lackers[chunk]
        fitting = next((one for one in groups if _fits(one, chunk, devices, missing)), None)
        if fitting is None:
            fitting = Group()
            groups.append(fitting)
        fitting.chunks.append(chunk)
        fitting.mends |= dict.fromkeys(devices, chunk)
    return groups


def _fits(found: Group, chunk: int, devices: AbstractSet[str], missing: Mapping[str, int]) -> bool:
    """Whether each device would still lack just one chunk of the group."""
    if len(found.chunks) >= LIMITS.combined_chunks or any(missing[one] >> chunk & 1 for one in found.mends):
        return False
    others = 0
    for one in found.chunks:
        others |= 1 << one
    return not any(missing[one] & others for one in devices)
