"""Scores from a confusion matrix: pure. Precision, recall and F1 are None where there is nothing to divide by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from fleet_server.telemetry.schemas import ClassMetrics


@dataclass(frozen=True)
class Scores:
    """Accuracy, and the means over classes that have a label (macro averages), from 0 to 1."""

    labelled: int
    accuracy: float | None
    macro_precision: float | None
    macro_recall: float | None
    macro_f1: float | None
    classes: list[ClassMetrics]


def scores(cells: Iterable[tuple[int, int, int]]) -> Scores:
    """Scores of `(label, predicted, count)` cells; cells of the same pair add up."""
    matrix: Counter[tuple[int, int]] = Counter()
    for label, predicted, count in cells:
        matrix[label, predicted] += count
    total = sum(matrix.values())
    if total == 0:
        return Scores(0, None, None, None, None, [])
    support: Counter[int] = Counter()
    guessed: Counter[int] = Counter()
    for (label, predicted), count in matrix.items():
        support[label] += count
        guessed[predicted] += count
    classes = [
        _class(label, matrix[label, label], guessed[label], support[label]) for label in sorted(support | guessed)
    ]
    labelled = [one for one in classes if one.support]
    return Scores(
        labelled=total,
        accuracy=sum(matrix[label, label] for label in support) / total,
        macro_precision=_mean([one.precision or 0.0 for one in labelled]),
        macro_recall=_mean([one.recall or 0.0 for one in labelled]),
        macro_f1=_mean([one.f1 or 0.0 for one in labelled]),
        classes=classes,
    )


def _class(label: int, hits: int, guessed: int, support: int) -> ClassMetrics:
    return ClassMetrics(
        label=label,
        precision=hits / guessed if guessed else None,
        recall=hits / support if support else None,
        f1=2 * hits / (guessed + support) if guessed + support else None,
        support=support,
    )


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
