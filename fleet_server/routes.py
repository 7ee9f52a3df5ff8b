"""What every endpoint of the API does alike, whatever its subject."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from fleet_server.errors import FieldProblem, InvalidError
from fleet_server.idempotency import keep_answer
from fleet_server.preconditions import entity_tag, none_match, observed_of

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class ApiRoute(APIRoute):
    """The route class of every router below `/api/v1`: what is read has an ETag, what acts is done once."""

    def get_route_handler(self) -> Handler:
        """FastAPI's hook around an endpoint."""
        handle = super().get_route_handler()
        return self._reading(handle) if "GET" in (self.methods or ()) else _acting(handle)

    def _reading(self, handle: Handler) -> Handler:
        observed = observed_of(self.response_model)

        async def read(request: Request) -> Response:
            answer = await handle(request)
            if answer.status_code != 200 or not answer.headers.get("content-type", "").startswith("application/json"):
                return answer
            tag = entity_tag(bytes(answer.body), observed)
            if none_match(request.headers.get("if-none-match"), tag):
                return Response(status_code=304, headers={"ETag": tag})
            answer.headers["ETag"] = tag
            return answer

        return read


def _acting(handle: Handler) -> Handler:
    async def act(request: Request) -> Response:
        answer = await handle(request)
        await keep_answer(request, answer)
        return answer

    return act


async def known_parameters(request: Request) -> None:
    """Dependency of every router below `/api/v1`: a filter with a misspelt name must not be one that narrows nothing.

    Raises:
        InvalidError: naming the parameters that the operation does not have.
    """
    route: APIRoute = request.scope["route"]
    if not request.scope["query_string"]:
        return
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
