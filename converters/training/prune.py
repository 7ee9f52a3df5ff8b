"""Structured pruning: channels are removed, so that size and latency fall; of each as many as do least harm.

How much harm a group's removal does is measured: the answers on training rows without a part of its channels are
compared with those of the whole net. Adaptive pruning goes on, a share of the work at a time with fine-tuning between,
until the net loses more on held-back rows than the budget; then it takes back the last step and tries half of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from converters.errors import ConversionError
from converters.training.allocate import Bound, bound, cheapest, evenly, work
from converters.training.channels import Structure, analyse, count, prepared, remove, without
from converters.training.data import Rows
from converters.training.fit import Fitting, Say, copied, divergence, error, fit, outputs
from converters.training.record import Parameter

RATIOS = (0.25, 0.5, 0.75, 0.9)
SENSITIVITY_ROWS = 96
STEP_SHARE = 0.4  # of the work that is left, after each step
LEAST_SHARE = 0.02
PATIENCE = 2  # fine-tunings of a step that is not there yet
HOPELESS = 6  # times the budget, beyond which another fine-tuning is no use
ROUNDS = 2  # of fixed pruning: the last half of the way after a first fine-tuning


@dataclass(frozen=True)
class Trained:
    """Training rows in two parts, and how to train.

    Attributes:
        rows: to train on.
        held_back: to decide by.
        how: of each fine-tuning.
        say: told how far it is.
    """

    rows: Rows
    held_back: Rows
    how: Fitting
    say: Say = lambda _: None


def sensitivities(net: Any, structure: Structure, rows: Rows) -> dict[str, list[tuple[float, float]]]:
    """By group, (ratio, how far the answers are from the whole net's) for rising ratios."""
    few = rows.first(SENSITIVITY_ROWS)
    graph, importance = prepared(net, rows)
    wanted = outputs(net, few)
    found = {}
    for root in structure.groups:
        curve = [(0.0, 0.0)]
        for ratio in RATIOS:
            with without(net, graph, root, ratio, importance):
                harm = divergence(outputs(net, few), wanted, classifies=rows.classifies)
            curve.append((ratio, harm))
        found[root] = curve
    net.zero_grad(set_to_none=True)
    return found


def prune_to(net: Any, share: float, trained: Trained, found: dict[str, Parameter], *, adaptive: bool = True) -> Any:
    """A net with a share of the work left, fine-tuned with the whole net as teacher.

    Args:
        net: stays as it is.
        share: of the multiply-accumulates that is to be left, 0 to 1.
        trained: what to fine-tune on.
        found: gets what was left.
        adaptive: ratios by sensitivity; else the same everywhere.

    Raises:
        ConversionError: `not_prunable`.
    """
    layers = analyse(net, trained.rows).layers
    current = copied(net)
    for number in range(ROUNDS):
        # Of the whole net: a round may leave more of its time than of its work.
        current = _step(current, bound(layers, share ** ((number + 1) / ROUNDS)), trained, adaptive=adaptive)
        how = trained.how if number == ROUNDS - 1 else replace(trained.how, epochs=trained.how.epochs / 3)
        fit(current, trained.rows, how, teacher=net, say=trained.say, name=f"recover {number + 1}/{ROUNDS}")
    found.update(said(net, current, trained))
    return current


def prune_within(net: Any, budget: float, trained: Trained, found: dict[str, Parameter]) -> list[Any]:
    """Nets whose error on held-back rows rises by no more than a budget, ever smaller; the last is the smallest.

    Args:
        net: stays as it is.
        budget: points (see `fit.error`).
        trained: what to fine-tune on.
        found: gets what was left in the smallest, and each step's share and loss.

    Raises:
        ConversionError: `not_prunable`.
    """
    whole = count(net, trained.rows)[0]
    allowed = error(net, trained.held_back) + budget
    kept, best, factor = [], copied(net), STEP_SHARE
    steps: list[str] = []
    while count(best, trained.rows)[0] * factor > LEAST_SHARE * whole:
        try:
            tried = _step(copied(best), factor, trained, adaptive=True)
        except ConversionError:
            if not steps:
                raise
            break  # what is left can't do without any of its channels
        share = count(tried, trained.rows)[0] / whole
        if share > count(best, trained.rows)[0] / whole * 0.97:
            break  # nothing more can be removed
        for attempt in range(PATIENCE):
            name = f"recover at {share:.0%} of the work" + (", again" if attempt else "")
            fit(tried, trained.rows, trained.how, teacher=net, say=trained.say, name=name)
            lost = error(tried, trained.held_back) - allowed + budget
            if lost <= budget or lost > HOPELESS * budget + 1:
                break
        steps.append(f"{share:.3f}: {lost:+.2f}")
        trained.say(f"pruned to {share:.1%} of the work: {lost:+.2f} points of {budget:g} allowed")
        if lost <= budget:
            best = tried
            kept.append(best)
        elif factor > STEP_SHARE:
            break  # a smaller step was tried already
        else:
            factor = factor**0.5
    found.update(steps="; ".join(steps), **said(net, best, trained))
    return kept or [best]


def _step(net: Any, wanted: Bound | float, trained: Trained, *, adaptive: bool) -> Any:
    """Remove channels until no more than wanted is left, or that share of what there is."""
    structure = analyse(net, trained.rows)
    if isinstance(wanted, float):
        wanted = bound(structure.layers, wanted)
    channels = {root: group.channels for root, group in structure.groups.items()}
    ratios: Mapping[str, float]
    if adaptive:
        ratios = cheapest(structure.layers, sensitivities(net, structure, trained.rows), wanted, channels)
    else:
        ratios = evenly(structure.layers, channels, wanted.work / work(structure.layers, {}))
    remove(net, structure, ratios, trained.rows, trained.how.seed)
    return net


def said(net: Any, pruned: Any, trained: Trained) -> dict[str, Parameter]:
    """What is left of a net, for the record."""
    macs, parameters = count(net, trained.rows)
    left, still = count(pruned, trained.rows)
    return {
        "work_left": round(left / macs, 4),
        "parameters_before": parameters,
        "parameters_after": still,
        "points_lost_on_deciding_rows": round(error(pruned, trained.held_back) - error(net, trained.held_back), 3),
    }
