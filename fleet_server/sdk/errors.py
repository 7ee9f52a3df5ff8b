"""What the client raises: one class a kind of answer, carrying the problem document."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """The server refused a request.

    Attributes:
        status: of the HTTP answer; 0 when there was none.
        code: stable, safe to match on.
        detail: a sentence that ends in the remedy.
        problems: fields at fault, as `{"field", "detail"}`.
        request_id: to find it in the server's log.
    """

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        self.status = status
        self.code = str(problem.get("code", ""))
        self.detail = str(problem.get("detail", f"the server answered {status}"))
        self.problems: list[dict[str, str]] = list(problem.get("problems", []))
        self.request_id = str(problem.get("request_id", ""))
        super().__init__(self.detail)


class AuthError(ApiError):
    """401 or 403."""


class NotFoundError(ApiError):
    """404."""


class ConflictError(ApiError):
    """409."""


class ChangedError(ConflictError):
    """412: it has been changed since it was read."""


class UnreachableError(ApiError):
    """No answer came."""


def error_for(status: int, problem: dict[str, Any]) -> ApiError:
    """The error of an answer."""
    kinds: dict[int, type[ApiError]] = {401: AuthError, 403: AuthError, 404: NotFoundError, 409: ConflictError}
    kinds[412] = ChangedError
    return kinds.get(status, ApiError)(status, problem)


class ShoalError(Exception):
    """Something of a notebook's own: a net, rows or a rollout, as `detail` says; it ends in the remedy."""

    def __init__(self, detail: str) -> None:
        self.detail = detail
        super().__init__(detail)


class NetError(ShoalError):
    """A net, its rows or its optimizer can't be used: it can't be exported or trained, or its shapes are wrong."""


class BuildError(ShoalError):
    """A variant could not be built, or its gate refused it."""


class DeployError(ShoalError):
    """No device matches, a gate run did not pass, or a rollout did not succeed."""


class LocalError(ShoalError):
    """A server or an agent on this machine did not start."""


class ExportError(ShoalError):
    """A variant can't be written as what was asked for."""
