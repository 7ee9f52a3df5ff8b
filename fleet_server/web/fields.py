"""Which of an answer's complaints belongs beside which field of a form. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from fleet_server.web.api import Json

WHOLE = "body"  # the field that the API names where several fields together are wrong
AS_NAMED: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Placed:
    """A problem as a form shows it.

    Attributes:
        said: what stands above the form; None for nothing.
        wrong: what stands at each field, by its name.
    """

    said: Json | None = None
    wrong: dict[str, str] = field(default_factory=dict)


def place(problem: Json | None, names: Collection[str], called: Mapping[str, str] = AS_NAMED) -> Placed:
    """Put a problem where it belongs: at its fields; above the form what is of none.

    Args:
        problem: of the API; None for none.
        names: of the form's fields.
        called: by the API's name of a field, the form's; as the API names it where nothing else is said.
    """
    if problem is None:
        return Placed()
    wrong: dict[str, str] = {}
    elsewhere = not problem.get("problems")
    for one in problem.get("problems") or ():
        found, detail = _fields(str(one["field"]), str(one["detail"]))
        mine = [name for name in (called.get(name, name) for name in found) if name in names]
        elsewhere = elsewhere or not mine
        if mine:
            wrong.setdefault(mine[0], detail)
    if elsewhere:
        return Placed(problem, wrong)
    return Placed({"detail": "Nothing was changed: mend what is marked below."}, wrong)


def _fields(name: str, detail: str) -> tuple[list[str], str]:
    """The fields that a complaint is about, `to.0` being one of `to`, and what it says of them."""
    head, colon, rest = detail.partition(": ")
    named = head.replace(",", " ").split() if colon else []
    if name == WHOLE:
        return named, rest or detail
    return [name.split(".", maxsplit=1)[0]], rest if named == [name] else detail
