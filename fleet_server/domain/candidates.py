"""What is said of a variant's candidates, as the API has them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def quality_of(candidates: Sequence[Mapping[str, Any]]) -> str:
    """The measurement that budgets of accuracy were about: accuracy, fidelity or agreement."""
    measured = [one["measurements"] or {} for one in candidates]
    names = (name for name in ("accuracy", "fidelity") if any(one.get(name) is not None for one in measured))
    return next(names, "agreement")
