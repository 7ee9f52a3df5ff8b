"""Which device takes over a lost stage: within memory, and none faster."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from fleet_server.domain.sharding import MIB, Capacity, Need, memory_of, taken_over

needs = st.lists(st.builds(Need, st.integers(1, 9), st.integers(1, 9).map(float), st.integers(0, 9)), max_size=3)
capacities = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 9)), max_size=5
).map(lambda found: [Capacity(f"d{number}", *one) for number, one in enumerate(found)])  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(needs, capacities)
def test_the_slowest_is_as_fast_as_any_choice_makes_it(lost: list[Need], spares: list[Capacity]) -> None:
    choices = [
        max((need.seconds(spare) for need, spare in zip(lost, chosen, strict=True)), default=0.0)
        for chosen in itertools.permutations(spares, len(lost))
        if all(need.memory <= spare.memory for need, spare in zip(lost, chosen, strict=True))
    ]
    found = taken_over(lost, spares) if lost else []
    if not choices:
        assert found is None
        return
    assert found is not None
    by_id = {one.device: one for one in spares}
    assert len(set(found)) == len(lost)
    assert all(need.memory <= by_id[device].memory for need, device in zip(lost, found, strict=True))
    slowest = max((need.seconds(by_id[device]) for need, device in zip(lost, found, strict=True)), default=0.0)
    assert slowest == min(choices)


def test_memory_is_the_tighter_bound_or_a_share_of_all() -> None:
    assert memory_of(1000, None, None) == 250 * MIB
    assert memory_of(1000, 300, None) == 300 * MIB
    assert memory_of(1000, 300, 200) == 200 * MIB
    assert memory_of(1000, None, 900) == 900 * MIB
