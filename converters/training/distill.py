"""Distillation: a smaller net of the user's own learns from the first one; see `fit` for the method and its sources."""

from __future__ import annotations

from typing import Any

from converters.errors import ConversionError
from converters.training.data import Rows
from converters.training.fit import error, fit, outputs
from converters.training.prune import Trained
from converters.training.record import Parameter


def distill(teacher: Any, student: Any, trained: Trained, found: dict[str, Parameter]) -> Any:
    """Train a student on soft targets of a teacher beside the data's own.

    Args:
        teacher: stays as it is.
        student: a fresh net of the same inputs and outputs; trained in place, and returned.
        trained: what to train on.
        found: gets how much it loses against the teacher.

    Raises:
        ConversionError: `bad_student`, when its answers have another shape.
    """
    check_student(teacher, student, trained.rows)
    fit(student, trained.rows, trained.how, teacher=teacher, say=trained.say, name="distil")
    lost = error(student, trained.held_back) - error(teacher, trained.held_back)
    found.update(
        parameters_of_teacher=sum(one.numel() for one in teacher.parameters()),
        parameters_of_student=sum(one.numel() for one in student.parameters()),
        temperature=trained.how.temperature,
        soft_share=trained.how.soft,
        points_lost_on_deciding_rows=round(lost, 3),
    )
    return student


def check_student(teacher: Any, student: Any, rows: Rows) -> None:
    """Refuse a student that does not take what the teacher takes, or answers otherwise."""
    few = rows.first(2)
    student.eval()
    try:
        given = outputs(student, few).shape
    except Exception as problem:  # noqa: BLE001 (a net of the user's may raise anything)
        detail = f"--distill: the student does not run on the training rows: {type(problem).__name__}: {problem}"
        raise ConversionError("bad_student", detail[:500]) from None
    wanted = outputs(teacher, few).shape
    if given != wanted:
        detail = f"--distill: the student answers with shape {list(given)}, the net with {list(wanted)}"
        raise ConversionError("bad_student", detail)
