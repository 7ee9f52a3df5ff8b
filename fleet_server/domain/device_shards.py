"""Which server handles the messages of which devices: pure. Servers that live share the shards equally.

A shard that is given up is heard by its former server until another says that it hears it, so that nothing is said to
nobody in between: what two hear for a moment does no harm, for messages are idempotent.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from agent.protocol.topics import SHARDS

EVERY = frozenset(range(SHARDS))


@dataclass(frozen=True)
class Holding:
    """Who has a shard.

    Attributes:
        owner: name of the server; empty when the last one gave it up.
        confirmed: whether the owner hears its devices.
    """

    owner: str
    confirmed: bool


@dataclass(frozen=True)
class Turn:
    """What one server does about shards now.

    Attributes:
        keep: it goes on with these.
        take: free ones that it begins with.
        orphaned: of those, the ones whose server does not live any more: what their devices said may be lost.
        give: it gives these up, for another server has too few.
        settled: another server hears these by now.
    """

    keep: frozenset[int]
    take: frozenset[int]
    orphaned: frozenset[int]
    give: frozenset[int]
    settled: frozenset[int]


def fair_share(servers: int) -> int:
    """How many shards a server has at most, of so many servers."""
    return -(-SHARDS // max(servers, 1))


def turn(me: str, servers: Collection[str], shards: Mapping[int, Holding]) -> Turn:
    """What a server does about shards.

    Args:
        me: its name.
        servers: names of all that live, with its own.
        shards: who has each; one that is not there nobody ever had.
    """
    share = fair_share(len(servers))
    mine = sorted(shard for shard, held in shards.items() if held.owner == me)
    free = sorted(shard for shard in EVERY if shard not in shards or shards[shard].owner not in {me, *servers})
    take = frozenset(free[: max(0, share - len(mine))])
    return Turn(
        keep=frozenset(mine[:share]),
        take=take,
        orphaned=frozenset(shard for shard in take if shard in shards and shards[shard].owner),
        give=frozenset(mine[share:]),
        settled=frozenset(one for one, held in shards.items() if _hears(held, me, servers)),
    )


def _hears(held: Holding, me: str, servers: Collection[str]) -> bool:
    """Whether another server has it and hears it."""
    return held.confirmed and held.owner != me and held.owner in servers
