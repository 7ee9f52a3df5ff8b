"""Which candidate is picked, and what is said of the others: pure."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from agent.protocol.manifest import Precision, RuntimeName
from converters.job import Candidate, Measurements, Target
from converters.planner import choose, excesses, fates, plan, repairs


def measured(**changed: Any) -> Measurements:
    plain: dict[str, Any] = {
        "size": 1_000_000, "samples": 100, "accuracy": 0.95, "macro_precision": None, "macro_recall": None,
        "macro_f1": None, "classes": (), "agreement": 1.0, "max_difference": 0.0, "latency_p50_ms": 1.0,
        "latency_p95_ms": 1.2, "memory_mb": 10.0, "provider": "cpu",
    }  # fmt: skip
    return Measurements(**{**plain, **changed})


def target(**changed: Any) -> Target:
    plain: dict[str, Any] = {"accuracy_drop_points": 1.0}
    return Target("p", RuntimeName.ONNX, ("cpu",), tuple(Precision), **{**plain, **changed})


SOURCE = measured()


def candidates(wanted: Target, **found: Measurements | None) -> list[Candidate]:
    return [
        Candidate(
            name,
            Precision.FP32 if name == "fp32" else Precision.INT8,
            measurements=one,
            within_budgets=one is not None and not excesses(one, wanted, SOURCE),
            error=None if one else "it broke",
        )
        for name, one in found.items()
    ]


def picked(wanted: Target, **found: Measurements | None) -> str | None:
    made = candidates(wanted, **found)
    index = choose(made, wanted)
    return None if index is None else made[index].recipe


def test_the_fastest_within_budgets() -> None:
    fast, faster = measured(latency_p50_ms=0.5, size=300_000), measured(latency_p50_ms=0.2, accuracy=0.90)
    assert picked(target(), fp32=SOURCE, good=fast, sloppy=faster) == "good"
    assert picked(target(accuracy_drop_points=10.0), fp32=SOURCE, good=fast, sloppy=faster) == "sloppy"


def test_never_slower_than_fp32() -> None:
    assert picked(target(), fp32=SOURCE, int8=measured(latency_p50_ms=1.3, size=250_000)) == "fp32"


def test_noise_does_not_decide() -> None:
    """As fast and as large: the one that is true to the source; as fast and smaller: the smaller."""
    same = measured(latency_p50_ms=0.98, agreement=0.99, size=990_000)
    assert picked(target(), fp32=SOURCE, int8=same) == "fp32"
    assert picked(target(), fp32=SOURCE, int8=measured(latency_p50_ms=1.02, agreement=0.99, size=300_000)) == "int8"


@pytest.mark.parametrize(("objective", "winner"), [("latency", "fast"), ("size", "small"), ("accuracy", "fp32")])
def test_objectives(objective: str, winner: str) -> None:
    found = {
        "fp32": SOURCE,
        "fast": measured(latency_p50_ms=0.3, size=500_000, accuracy=0.945),
        "small": measured(latency_p50_ms=0.8, size=100_000, accuracy=0.945),
    }
    assert picked(target(objective=objective), **found) == winner


def test_where_nothing_keeps_the_budgets_the_most_accurate_is_named_so_that_the_gate_can_say_what_it_lacks() -> None:
    wanted = target(size_mb=0.1)
    made = candidates(wanted, fp32=SOURCE, int8=measured(accuracy=0.9))
    chosen = choose(made, wanted)
    assert chosen == 0
    said = [one.fate for one in fates(made, chosen, wanted, SOURCE)]
    assert said[0] == "picked as the nearest to the budgets; over: size"
    assert said[1] == "over budget: loses 5.00 points of 1 allowed, 1 MB of 0.1 allowed"
    assert picked(wanted, broken=None) is None


def test_fates_and_the_front() -> None:
    wanted = target()
    made = candidates(
        wanted,
        fp32=SOURCE,
        fast=measured(latency_p50_ms=0.4, size=300_000, accuracy=0.945),
        slow=measured(latency_p50_ms=1.5, size=290_000, accuracy=0.945),
        beaten=measured(latency_p50_ms=0.6, size=310_000, accuracy=0.945),
        broken=None,
    )
    found = {one.recipe: one for one in fates(made, choose(made, wanted), wanted, SOURCE)}
    assert found["fast"].fate == "picked"
    assert found["slow"].fate == "slower than fp32: 1.50 times its time"
    assert found["beaten"].fate == "slower than fast: 1.50 times its time"
    assert found["broken"].fate == "not built: it broke"
    assert {name for name, one in found.items() if one.on_front} == {"fp32", "fast", "slow"}


def test_weights_of_7_bits_are_tried_where_a_cpu_runs_them() -> None:
    """CPUs without VNNI add products in 16 bits: only there are they of use, and which CPU it is, measuring tells."""
    tried = {
        first: {one.name for one in plan(msgspec.structs.replace(target(), providers=(first, "cpu")))}
        for first in ("cpu", "cuda")
    }
    sevens = {"onnx-static-u8s7", "onnx-static-u8s7-percentile"}
    assert tried["cpu"] & sevens == sevens
    assert not tried["cuda"] & sevens


def test_repairs_are_tried_only_where_plain_int8_loses_too_much() -> None:
    wanted = target()
    good, bad = measured(accuracy=0.945), measured(accuracy=0.80)
    assert repairs(wanted, candidates(wanted, fp32=SOURCE, int8=good, other=bad), SOURCE) == []
    assert repairs(wanted, candidates(wanted, fp32=SOURCE), SOURCE) == []
    names = [recipe.name for recipe in repairs(wanted, candidates(wanted, fp32=SOURCE, int8=bad), SOURCE)]
    assert "onnx-mixed-u8s8" in names
    assert "onnx-equalized-u8s8" in names


def test_the_same_file_is_never_picked_twice_and_the_same_refusal_is_said_once() -> None:
    wanted = target()
    first, second, broken = candidates(wanted, first=measured(latency_p50_ms=0.5), second=measured(), broken=None)
    again = msgspec.structs.replace(broken, recipe="again")
    twin = msgspec.structs.replace(second, measurements=measured(latency_p50_ms=0.4), same_as="first")
    made = [first, twin, broken, again]
    assert choose(made, wanted) == 0
    said = fates(made, 0, wanted, SOURCE)
    assert [one.fate for one in said] == [
        "picked", "the same file as first", "not built: it broke", "not built: as broken",
    ]  # fmt: skip
    assert [one.on_front for one in said] == [True, False, False, False]


def test_recipes_of_an_accelerators_compiler_are_for_targets_that_have_it() -> None:
    names = {recipe.name for recipe in plan(target())}
    assert not any("edgetpu" in name for name in names)
    coral = Target("p", RuntimeName.LITERT, ("edgetpu", "cpu"), (Precision.INT8,))
    assert [recipe.name for recipe in plan(coral)] == ["litert-static-int8", "litert-static-int8-edgetpu"]


@pytest.mark.parametrize(
    ("providers", "known"),
    [
        (("cpu",), {"onnx-sums-fp32"}),
        ((), {"onnx-sums-fp32"}),
        (("cuda", "cpu"), {"onnx-fused-fp32"}),
        (("tensorrt", "cuda", "cpu"), set()),
        (("openvino", "cpu"), set()),
    ],
)
def test_graphs_are_reshaped_for_the_provider_that_is_tried_first(providers: tuple[str, ...], known: set[str]) -> None:
    wanted = Target("p", RuntimeName.ONNX, providers, (Precision.FP32,))
    assert {recipe.name for recipe in plan(wanted)} == {"onnx-fp32", *known}
