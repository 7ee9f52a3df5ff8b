"""Servers share the devices' shards: fairly, each by one, and heard by somebody at every moment."""

from __future__ import annotations

import random

from agent.protocol.topics import SHARDS
from fleet_server.domain.device_shards import EVERY, Holding, fair_share, turn


def owned(*owners: tuple[str, int], confirmed: bool = True) -> dict[int, Holding]:
    names = [name for name, count in owners for _ in range(count)]
    return {shard: Holding(name, confirmed) for shard, name in enumerate(names)}


def test_who_is_alone_takes_all() -> None:
    found = turn("a", ["a"], {})
    assert found.take == EVERY
    assert found.orphaned == found.give == frozenset()


def test_a_second_server_is_given_half() -> None:
    shards = owned(("a", SHARDS))
    first = turn("a", ["a", "b"], shards)
    assert len(first.keep) == len(first.give) == SHARDS // 2
    shards |= {one: Holding("", False) for one in first.give}
    second = turn("b", ["a", "b"], shards)
    assert second.take == first.give
    assert not second.orphaned, "it was given, so nothing that devices said is lost"
    shards |= {one: Holding("b", False) for one in second.take}
    assert not turn("a", ["a", "b"], shards).settled
    shards |= {one: Holding("b", True) for one in second.take}
    assert turn("a", ["a", "b"], shards).settled == second.take


def test_the_shards_of_a_server_that_died_are_taken_over() -> None:
    found = turn("a", ["a"], owned(("a", 32), ("b", 32)))
    assert found.take == found.orphaned == frozenset(range(32, 64))


def test_a_server_that_starts_again_has_what_it_had() -> None:
    found = turn("b", ["a", "b"], owned(("a", 32), ("b", 32)))
    assert found.keep == frozenset(range(32, 64))
    assert found.take == found.orphaned == frozenset()


def test_however_servers_come_and_go_each_shard_has_one_server_soon() -> None:
    chance = random.Random(3)
    shards: dict[int, Holding] = {}
    for _ in range(200):
        servers = chance.sample("abcde", chance.randint(1, 5))
        for _ in range(4):
            for name in chance.sample(servers, len(servers)):
                found = turn(name, servers, shards)
                assert not found.keep & found.give
                shards |= {one: Holding(name, True) for one in found.take}
                shards |= {one: Holding("", False) for one in found.give}
        owners = [shards[shard].owner for shard in sorted(EVERY)]
        assert set(owners) <= set(servers)
        assert max(map(owners.count, servers)) <= fair_share(len(servers))
