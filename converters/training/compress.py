"""A plan of training passes: prune, distil, fine-tune for integers, in this order; each that is wanted, each recorded.

It gives nets, not files: each is another place where the recipes of the planner start. What quantizes worst is known
only when it is measured, so a net that was fine-tuned for integers comes beside the one it was made of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from converters.errors import ConversionError
from converters.job import PassRecord
from converters.training.data import Rows, deciding
from converters.training.distill import distill
from converters.training.fit import Fitting, Say, copied
from converters.training.prune import Trained, prune_to, prune_within, said
from converters.training.quantize_aware import quantize_aware
from converters.training.record import Parameter, recorded, weight_bytes
from converters.training.sparsify import sparsify

TOOLS = ("torch", "torch-pruning", "numpy")
ADAPTIVE = "adaptive"
BEFORE = "pruned-less"


@dataclass(frozen=True)
class CompressionPlan:
    """What to do with a net.

    Attributes:
        prune: `adaptive` within the budget, a share of the work that is to be left, or None.
        sparsity: share of weights that are to be zero; None for no such net.
        student: builds a smaller net that is to learn from this one; None for none.
        quantize_aware: whether each net is also fine-tuned for integers.
        budget: points that pruning may cost on held-back training rows.
        how: of every training.
    """

    prune: str | float | None = ADAPTIVE
    sparsity: float | None = None
    student: Callable[[], Any] | None = None
    quantize_aware: bool = False
    budget: float = 0.5
    how: Fitting = field(default_factory=Fitting)


@dataclass(frozen=True)
class Compressed:
    """A net that came of a plan, with its name in candidates and its passes."""

    name: str
    net: Any
    passes: tuple[PassRecord, ...]


def compress(
    net: Any, rows: Rows, plan: CompressionPlan, say: Say = lambda _: None, *, validation: Rows | None = None
) -> tuple[list[Compressed], list[str]]:
    """Carry out a plan.

    Args:
        net: in evaluation mode; stays as it is.
        rows: training rows.
        plan: what to do.
        say: told how far it is.
        validation: rows to decide by; without, a fifth of the training rows is held back.

    Returns:
        The nets, and why a pass could not be done, a sentence each: the others go on.
    """
    trained = Trained(*deciding(rows, validation, plan.how.seed), plan.how, say)
    nets: list[Compressed] = []
    problems: list[str] = []

    def attempt(work: Callable[[], Compressed | list[Compressed]]) -> None:
        try:
            made = work()
        except ConversionError as problem:
            problems.append(problem.detail)
        else:
            nets.extend(made if isinstance(made, list) else [made])

    if plan.prune == ADAPTIVE:
        attempt(lambda: _pruned_within(net, trained, plan))
    elif plan.prune is not None:
        attempt(lambda: _pruned_to(net, trained, float(plan.prune or 1.0)))
    if plan.sparsity is not None:
        attempt(lambda: _sparse(net, trained, float(plan.sparsity or 0.0)))
    if plan.student is not None:
        student = plan.student
        attempt(lambda: _student(net, student(), trained))
    if plan.quantize_aware:
        for start in [Compressed("whole", net, ()), *(one for one in nets if one.name != BEFORE)]:
            attempt(lambda start=start: _integer_ready(net, start, trained))  # type: ignore[misc]
    return nets, problems


def _settings(plan: Fitting) -> dict[str, Parameter]:
    return {"epochs": plan.epochs, "rate": plan.rate, "batch": plan.batch, "seed": plan.seed}


def _pruned_within(net: Any, trained: Trained, plan: CompressionPlan) -> list[Compressed]:
    """The smallest net within the budget, and the one before it: integers may cost the smallest what was left of it."""
    records: list[PassRecord] = []
    settings = _settings(trained.how)
    found: list[Any] = []
    with recorded(records, "prune-adaptive", net, budget=plan.budget, **settings) as running:
        found = prune_within(net, plan.budget, trained, running.found)
        running.net = found[-1]
    nets = [Compressed("pruned", found[-1], tuple(records))]
    if len(found) > 1:
        before = msgspec.structs.replace(
            records[0],
            parameters={**records[0].parameters, **said(net, found[-2], trained)},
            bytes_after=weight_bytes(found[-2]),
        )
        nets.append(Compressed(BEFORE, found[-2], (before,)))
    return nets


def _pruned_to(net: Any, trained: Trained, share: float) -> Compressed:
    records: list[PassRecord] = []
    with recorded(records, "prune", net, work_wanted=share, **_settings(trained.how)) as running:
        running.net = prune_to(net, share, trained, running.found)
    return Compressed(f"pruned-{share:g}", running.net, tuple(records))


def _sparse(net: Any, trained: Trained, sparsity: float) -> Compressed:
    records: list[PassRecord] = []
    with recorded(records, "sparsify", net, wanted=sparsity, **_settings(trained.how)) as running:
        running.net = sparsify(net, sparsity, trained, running.found)
    return Compressed(f"sparse-{sparsity:g}", running.net, tuple(records))


def _student(net: Any, student: Any, trained: Trained) -> Compressed:
    records: list[PassRecord] = []
    with recorded(records, "distill", net, **_settings(trained.how)) as running:
        running.net = distill(net, student, trained, running.found)
    return Compressed("distilled", running.net, tuple(records))


def _integer_ready(net: Any, start: Compressed, trained: Trained) -> Compressed:
    records = list(start.passes)
    with recorded(records, "quantize-aware", start.net, **_settings(trained.how)) as running:
        running.net = quantize_aware(copied(start.net), net, trained, running.found)
    return Compressed(f"{start.name}-qat", running.net, tuple(records))
