"""How much of each group of channels is removed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from converters.training.allocate import HIGHEST, Layer, bound, cheapest, cost, evenly, harm, work

CHAIN = (Layer(100.0, "a", None), Layer(400.0, "b", "a"), Layer(100.0, None, "b"))
EVEN = [(0.0, 0.0), (0.5, 1.0), (0.9, 4.0)]


def test_work_of_a_layer_falls_with_both_its_sides() -> None:
    assert work(CHAIN, {}) == 600
    assert work(CHAIN, {"a": 0.5}) == 50 + 200 + 100
    assert work(CHAIN, {"a": 0.5, "b": 0.5}) == 50 + 100 + 50
    assert work((Layer(10.0, "a", "a"),), {"a": 0.5}) == 5, "a depthwise layer's channels are the same on both sides"


def test_evenly_leaves_the_share_that_was_asked_for() -> None:
    ratios = evenly(CHAIN, {"a": 1024, "b": 1024}, 0.5)
    assert ratios["a"] == ratios["b"]
    assert 285 < work(CHAIN, ratios) <= 300


def test_what_does_no_harm_goes_first() -> None:
    curves = {"a": [(0.0, 0.0), (0.9, 0.0)], "b": EVEN}
    ratios = cheapest(CHAIN, curves, bound(CHAIN, 0.6))
    assert ratios["a"] > ratios["b"]
    assert work(CHAIN, ratios) <= 360


def test_noise_does_not_make_more_removal_less_harmful() -> None:
    curves = {"a": [(0.0, 0.0), (0.25, 5.0), (0.5, 0.1), (0.9, 0.1)], "b": EVEN}
    ratios = cheapest(CHAIN, curves, bound(CHAIN, 0.9))
    assert ratios["a"] == 0
    assert ratios["b"] > 0


def test_it_ends_where_nothing_more_can_go() -> None:
    ratios = cheapest(CHAIN, {"a": EVEN}, bound(CHAIN, 0.01))
    assert HIGHEST - 0.1 < ratios["a"] <= HIGHEST


def test_harm_between_two_measurements() -> None:
    assert harm(EVEN, 0.25) == 0.5
    assert harm(EVEN, 2.0) == 4.0


@given(st.floats(0.05, 0.95), st.lists(st.floats(0, 100), min_size=3, max_size=3))
def test_the_share_is_met_by_ratios_that_are_possible(share: float, harms: list[float]) -> None:
    curves = {"a": list(zip((0.0, 0.5, 0.9), harms, strict=True)), "b": EVEN}
    ratios = cheapest(CHAIN, curves, bound(CHAIN, share))
    assert all(0 <= ratio <= HIGHEST for ratio in ratios.values())
    assert work(CHAIN, ratios) <= share * 600 or all(ratio > 0.8 for ratio in ratios.values())


def test_weights_cost_time_too() -> None:
    """Of two groups with the same work and harm, the one whose layer has more weights to fetch is cut."""
    layers = [Layer(100.0, "light", None, 1.0), Layer(100.0, "heavy", None, 10.0)]
    curves = {name: [(0.0, 0.0), (0.9, 1.0)] for name in ("light", "heavy")}
    ratios = cheapest(layers, curves, bound(layers, 0.8), {"light": 64, "heavy": 64})
    assert ratios == {"light": 0.0, "heavy": 0.5}
    assert work(layers, ratios) <= 0.8 * work(layers, {})


def test_a_share_of_the_work_is_one_of_the_cost_too() -> None:
    layers = [Layer(100.0, "light", None, 0.0), Layer(100.0, "heavy", None, 100.0)]
    curves = {"light": [(0.0, 0.0), (0.9, 0.0)], "heavy": [(0.0, 0.0), (0.9, 1.0)]}
    ratios = cheapest(layers, curves, bound(layers, 0.5), {"light": 64, "heavy": 64})
    assert cost(layers, ratios) <= 0.5 * cost(layers, {})
    assert ratios["heavy"] > 0


def test_what_is_left_after_rounding_is_no_more_than_was_asked_for() -> None:
    layers = [Layer(100.0, "a", None), Layer(300.0, "b", "a")]
    ratios = evenly(layers, {"a": 64, "b": 24}, 0.5)
    assert work(layers, ratios) <= 0.5 * work(layers, {})
    left = {"a": round((1 - ratios["a"]) * 64), "b": round((1 - ratios["b"]) * 24)}
    assert left["a"] % 16 == left["b"] % 8 == 0
