"""Cuts of chains: complete, within memory, and as good as any."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.sharding.planner import Chain, NoPlanError, Place, plan, shortlist

sizes = st.integers(1, 100)


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    count = draw(st.integers(1, 6))
    crossing = [float(draw(sizes)) for _ in range(count + 1)]
    for position in draw(st.sets(st.integers(1, max(1, count - 1)), max_size=2)):
        if position < count:
            crossing[position] = np.inf
    weights = draw(
        st.lists(st.tuples(sizes, st.sets(st.integers(0, count - 1), min_size=1).map(lambda one: tuple(sorted(one)))))
    )
    return Chain(
        np.array([draw(sizes) / 10 for _ in range(count)]),
        np.array([float(draw(sizes)) for _ in range(count)]),
        tuple(weights),
        np.array(crossing),
    )


places = st.lists(st.tuples(st.integers(20, 400), st.integers(1, 8), st.integers(1, 100)), min_size=1, max_size=4).map(
    lambda found: [Place(f"d{index}", float(one[0]), one[1] / 2, one[2]) for index, one in enumerate(found)]
)


def _cost(chain: Chain, start: int, end: int, place: Place, rows: int) -> float:
    """By its definition, not by the planner's matrices."""
    memory = sum(size for size, users in chain.weights if any(start <= user < end for user in users))
    memory += float(chain.live[start:end].max()) * rows
    if memory > place.memory:
        return np.inf
    crossed = chain.crossing[start] + chain.crossing[end]
    return float(chain.seconds[start:end].sum() / place.speed + crossed / place.bytes_per_s)


def _brute(chain: Chain, found: list[Place], stages: int, rows: int) -> float:
    count = len(chain.seconds)
    best = np.inf
    inner = [position for position in range(1, count) if np.isfinite(chain.crossing[position])]
    for cuts in itertools.combinations(inner, stages - 1):
        bounds = [0, *cuts, count]
        for order in itertools.permutations(found, stages):
            costs = [
                _cost(chain, *pair, place, rows) for pair, place in zip(itertools.pairwise(bounds), order, strict=True)
            ]
            best = min(best, max(costs))
    return float(best)


@settings(max_examples=300, deadline=None)
@given(chains(), places, st.integers(1, 4), st.integers(1, 3))
def test_the_slowest_stage_is_as_fast_as_any_choice_makes_it(
    chain: Chain, found: list[Place], stages: int, rows: int
) -> None:
    best = _brute(chain, found, stages, rows)
    try:
        made = plan(chain, found, stages, rows)
    except NoPlanError:
        assert best == np.inf
        return
    assert max(stage.seconds for stage in made) == pytest.approx(best)
    assert len(made) == stages
    assert [stage.start for stage in made] == [0, *(stage.end for stage in made[:-1])], "every node in one stage"
    assert made[-1].end == len(chain.seconds)
    assert len({stage.device for stage in made}) == stages
    by_name = {place.device: place for place in found}
    for stage in made:
        assert stage.memory <= by_name[stage.device].memory
        assert np.isfinite(_cost(chain, stage.start, stage.end, by_name[stage.device], rows))
        assert stage.bytes_out == chain.crossing[stage.end]


@settings(max_examples=100, deadline=None)
@given(chains(), places)
def test_without_a_number_the_fewest_stages_that_fit_are_taken(chain: Chain, found: list[Place]) -> None:
    fits = [count for count in range(1, len(found) + 1) if np.isfinite(_brute(chain, found, count, 1))]
    if fits:
        assert len(plan(chain, found, None)) == fits[0]
    else:
        with pytest.raises(NoPlanError, match="memory"):
            plan(chain, found, None)


def _chain(count: int) -> Chain:
    return Chain(np.ones(count), np.ones(count), ((10, (0,)), (10, (count - 1,))), np.ones(count + 1))


def test_what_is_in_the_way_is_said() -> None:
    small = [Place("a", 5.0, 1.0, 1e9), Place("b", 5.0, 1.0, 1e9)]
    with pytest.raises(NoPlanError, match="a piece of the net that can't be cut needs"):
        plan(_chain(4), small, 2)
    with pytest.raises(NoPlanError, match="3 stages need 3 devices, and 2 can be had"):
        plan(_chain(4), small, 3)
    with pytest.raises(NoPlanError, match="a net is cut into 1 to 8"):
        plan(_chain(4), small, 9)
    with pytest.raises(NoPlanError, match="can be cut at 0 places"):
        plan(_chain(1), small, 2)


def test_a_thousand_alike_devices_and_nodes_are_planned_at_once() -> None:
    alike = [Place(f"d{number}", 100.0, 1.0, 1e9) for number in range(1000)]
    assert len(shortlist(alike)) <= 10
    made = plan(_chain(1000), alike, 4)
    assert max(stage.compute_s for stage in made) == pytest.approx(250, abs=3)
