"""What every endpoint of the API does alike, whatever its subject."""

from __future__ import annotations

from fastapi import Request
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from fleet_server.errors import FieldProblem, InvalidError


def known_parameters(request: Request) -> None:
    """Dependency of every router below `/api/v1`: a filter with a misspelt name must not be one that narrows nothing.

    Raises:
        InvalidError: naming the parameters that the operation does not have.
    """
    route: APIRoute = request.scope["route"]
    known = parameters_of(route.dependant)
    unknown = [name for name in dict.fromkeys(request.query_params) if name not in known]
    if unknown:
        has = ", ".join(sorted(known)) or "none"
        found = tuple(
            FieldProblem(one.encode(errors="replace").decode()[:64], f"there is no such parameter; there are: {has}")
            for one in unknown[:5]
        )
        detail = "; ".join(f"{one.field}: {one.detail}" for one in found)
        raise InvalidError("unknown_parameter", detail, problems=found)


def parameters_of(dependant: Dependant) -> set[str]:
    """The names of all query parameters of an operation."""
    own = {field.alias for field in dependant.query_params}
    return own.union(*(parameters_of(one) for one in dependant.dependencies))
