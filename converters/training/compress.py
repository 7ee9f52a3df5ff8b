"""A plan of training passes: prune, distil, fine-tune for integers, in this order; each that is wanted, each recorded.

It gives nets, not files: each is another place where the recipes of the planner start. What quantizes worst is known
only when it is measured, so a net that was fine-tuned for integers comes beside the one it was made of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from converters.errors import ConversionError
from converters.job import PassRecord
from converters.training.data import Rows, hold_back
from converters.training.distill import distill
from converters.training.fit import Fitting, Say, copied
from converters.training.prune import Trained, prune_to, prune_within
from converters.training.quantize_aware import quantize_aware
from converters.training.record import Parameter, recorded
from converters.training.sparsify import sparsify

TOOLS = ("torch", "torch-pruning", "numpy")
ADAPTIVE = "adaptive"


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
    net: Any, rows: Rows, plan: CompressionPlan, say: Say = lambda _: None
) -> tuple[list[Compressed], list[str]]:
    """Carry out a plan.

    Args:
        net: in evaluation mode; stays as it is.
        rows: training rows; a fifth of them is held back to decide by.
        plan: what to do.
        say: told how far it is.

    Returns:
        The nets, and why a pass could not be done, a sentence each: the others go on.
    """
    training, held_back = hold_back(rows, plan.how.seed)
    trained = Trained(training, held_back, plan.how, say)
    nets: list[Compressed] = []
    problems: list[str] = []

    def attempt(work: Callable[[], Compressed]) -> None:
        try:
            nets.append(work())
        except ConversionError as problem:
            problems.append(problem.detail)

    if plan.prune is not None:
        attempt(lambda: _pruned(net, trained, plan))
    if plan.sparsity is not None:
        attempt(lambda: _sparse(net, trained, float(plan.sparsity or 0.0)))
    if plan.student is not None:
        student = plan.student
        attempt(lambda: _student(net, student(), trained))
    if plan.quantize_aware:
        for start in [Compressed("whole", net, ()), *nets]:
            attempt(lambda start=start: _integer_ready(net, start, trained))  # type: ignore[misc]
    return nets, problems


def _settings(plan: Fitting) -> dict[str, Parameter]:
    return {"epochs": plan.epochs, "rate": plan.rate, "batch": plan.batch, "seed": plan.seed}


def _pruned(net: Any, trained: Trained, plan: CompressionPlan) -> Compressed:
    records: list[PassRecord] = []
    settings = _settings(trained.how)
    if plan.prune == ADAPTIVE:
        with recorded(records, "prune-adaptive", net, budget=plan.budget, **settings) as running:
            running.net = prune_within(net, plan.budget, trained, running.found)
        name = "pruned"
    else:
        share = float(plan.prune or 1.0)
        with recorded(records, "prune", net, work_wanted=share, **settings) as running:
            running.net = prune_to(net, share, trained, running.found)
        name = f"pruned-{share:g}"
    return Compressed(name, running.net, tuple(records))


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
