"""The short form: a moment at every decoder, with random bytes and with messages that were changed."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.fuzz.mutate import mutated
from tests.fuzz.targets import TARGETS

COUNT = 400
LEAST = 25


def count(name: str) -> int:
    return max(LEAST, int(COUNT * TARGETS[name].share))


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_what_is_sent_in_order_is_taken(name: str) -> None:
    for seed in TARGETS[name].seeds:
        TARGETS[name].run(seed)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_bytes_of_nobody_end_in_the_decoders_own_error(name: str) -> None:
    @settings(max_examples=count(name), deadline=None, suppress_health_check=list(HealthCheck))
    @given(payload=st.binary(max_size=400))
    @example(payload=b"")
    def check(payload: bytes) -> None:
        TARGETS[name].run(payload)

    check()


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_changed_messages_end_in_the_decoders_own_error(name: str) -> None:
    chance = random.Random(name)
    for _ in range(count(name)):
        payload = bytearray(mutated(chance.choice(TARGETS[name].seeds), chance))
        for _ in range(chance.choice((0, 0, 1, 4)) if payload else 0):
            payload[chance.randrange(len(payload)) :] = payload[chance.randrange(len(payload)) :]
        if chance.random() < 0.3 and payload:
            payload[chance.randrange(len(payload))] = chance.randrange(256)
        TARGETS[name].run(bytes(payload))
