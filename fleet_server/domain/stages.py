"""Which device comes when: pure. The same devices give the same answer, on every server and after every restart."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fleet_server.domain.strategy import Order, RolloutStrategy, Stage


@dataclass(frozen=True)
class Member:
    """A device of a rollout, as far as its place in it goes."""

    device_id: str
    profile: str
    tags: Mapping[str, str] = field(default_factory=dict)


def in_order(members: Sequence[Member], order: Order, seed: str) -> list[Member]:
    """Devices in the order in which they come.

    Args:
        members: in any order.
        order: as the strategy has it.
        seed: names the random order.
    """
    queues: dict[tuple[int, str], list[Member]] = defaultdict(list)
    for member in sorted(members, key=lambda one: _hash(seed, one.device_id)):
        queues[_tag_rank(member, order), member.profile].append(member)
    placed = [
        (rank, place / len(queue), profile, member)
        for (rank, profile), queue in queues.items()
        for place, member in enumerate(queue)
    ]
    placed.sort(key=lambda one: one[:3])
    return [member for *_, member in placed]


def assign_stages(members: Sequence[Member], strategy: RolloutStrategy, seed: str) -> dict[str, int]:
    """The stage of each device, in the order in which they come."""
    ordered = in_order(members, strategy.order, seed)
    sizes = [_size(stage, len(ordered)) for stage in strategy.stages]
    return {
        member.device_id: next(index for index, size in enumerate(sizes) if place < size)
        for place, member in enumerate(ordered)
    }


def late_stage(device_id: str, strategy: RolloutStrategy, seed: str, *, present: int, total: int) -> int:
    """The stage of a device that joins later: that of its place in the random order, but none that is over.

    Args:
        device_id: of it.
        strategy: of the rollout.
        seed: names the random order.
        present: index of the stage that is open.
        total: devices of the rollout so far.
    """
    place = _hash(seed, device_id) / 2**64 * total
    own = next(
        (index for index, stage in enumerate(strategy.stages) if place < _size(stage, total)), len(strategy.stages) - 1
    )
    return max(own, present)


def _size(stage: Stage, total: int) -> int:
    """How many devices have the version when a stage is done; never more than there are."""
    if stage.count is not None:
        return min(stage.count, total)
    return math.ceil(total * (stage.percent or 0) / 100 - 1e-9)


def _tag_rank(member: Member, order: Order) -> int:
    value = member.tags.get(order.tag or "")
    return order.first.index(value) if value in order.first else len(order.first)


def _hash(seed: str, device_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{device_id}".encode(), digest_size=8).digest(), "big")
