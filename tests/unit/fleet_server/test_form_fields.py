"""Complaints of the API stand at the fields of the form that they are about; what is of none stands above it."""

from __future__ import annotations

import pytest

from fleet_server.web.fields import Placed, place
from fleet_server.web.forms import number

FIELDS = ("name", "threshold", "clear", "to")
ABOVE = {"detail": "Nothing was changed: mend what is marked below."}


def problem(*fields: tuple[str, str]) -> dict[str, object]:
    return {"detail": "no", "problems": [{"field": field, "detail": detail} for field, detail in fields]}


@pytest.mark.parametrize(
    ("field", "detail", "wrong"),
    [
        ("threshold", "a number", {"threshold": "a number"}),
        ("to.0", "no address", {"to": "no address"}),
        ("name", "name: it is taken", {"name": "it is taken"}),
        ("body", "clear: on the bad side", {"clear": "on the bad side"}),
        ("body", "threshold, clear, below: leave them out", {"threshold": "leave them out"}),
    ],
)
def test_a_complaint_stands_at_its_field(field: str, detail: str, wrong: dict[str, str]) -> None:
    assert place(problem((field, detail)), FIELDS) == Placed(ABOVE, wrong)


def test_what_is_of_no_field_stands_above_and_the_rest_at_its_fields() -> None:
    said = problem(("query", "it can't be read"), ("name", "too long"))
    assert place(said, FIELDS) == Placed(said, {"name": "too long"})
    refused = {"detail": "changed meanwhile", "problems": []}
    assert place(refused, FIELDS) == Placed(refused)
    assert place(None, FIELDS) == Placed()


def test_a_field_that_the_form_calls_otherwise_is_found() -> None:
    said = problem(("gate.min_accuracy", "at most 1"), ("name", "it is taken"))
    called = {"gate": "min_accuracy", "name": "version"}
    assert place(said, ("version", "min_accuracy"), called) == Placed(
        ABOVE, {"min_accuracy": "at most 1", "version": "it is taken"}
    )


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "hot"])
def test_what_json_has_no_number_for_is_left_for_the_api_to_refuse(text: str) -> None:
    assert number(text) == text


def test_numbers_are_numbers() -> None:
    assert (number("1e3"), number("-0.5"), number("")) == (1000.0, -0.5, None)
