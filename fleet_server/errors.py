"""Errors of the fleet server: each names what was wrong and what would mend it.

app.py turns them into RFC 9457 problems; nothing here knows HTTP but the status that fits each kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class FieldProblem:
    """One field of a request and what is wrong with it."""

    field: str
    detail: str


class FleetError(Exception):
    """Base of all errors that the fleet server raises on purpose.

    Attributes:
        code: stable and safe to match on, such as `no_variant_for_profile`.
        detail: a sentence for people, ending in the remedy.
        problems: the fields at fault, when there are any.
    """

    status: ClassVar[int] = 500
    title: ClassVar[str] = "The server failed"

    def __init__(self, code: str, detail: str, *, problems: tuple[FieldProblem, ...] = ()) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.problems = problems


class InvalidError(FleetError):
    """The request can't be carried out as it is written."""

    status = 422
    title = "The request is not valid"

    def __init__(
        self, code: str, detail: str, *, field: str | None = None, problems: tuple[FieldProblem, ...] = ()
    ) -> None:
        super().__init__(code, detail, problems=problems or ((FieldProblem(field, detail),) if field else ()))


class NotFoundError(FleetError):
    """What was asked for is not there."""

    status = 404
    title = "Not found"

    def __init__(self, kind: str, name: str, *, remedy: str = "") -> None:
        super().__init__(
            f"{kind}_not_found", f"there is no {kind.replace('_', ' ')} {name!r}" + (f"; {remedy}" if remedy else "")
        )


class ConflictError(FleetError):
    """The request does not fit the present state."""

    status = 409
    title = "Conflict"


class InProgressError(ConflictError):
    """The same request is being carried out.

    Attributes:
        retry_after_s: when to ask again, in seconds.
    """

    def __init__(self, code: str, detail: str, retry_after_s: float) -> None:
        super().__init__(code, detail)
        self.retry_after_s = retry_after_s


class PreconditionFailedError(FleetError):
    """What the client said must hold, with `If-Match`, does not."""

    status = 412
    title = "Precondition failed"


class UnauthorizedError(FleetError):
    """The caller did not prove who they are."""

    status = 401
    title = "Not authenticated"


class ForbiddenError(FleetError):
    """The caller is known, and may not do this."""

    status = 403
    title = "Not allowed"


class TooManyRequestsError(FleetError):
    """The caller asks too often.

    Attributes:
        retry_after_s: when to ask again, in seconds.
    """

    status = 429
    title = "Too many requests"

    def __init__(self, code: str, detail: str, *, retry_after_s: float) -> None:
        super().__init__(code, detail)
        self.retry_after_s = retry_after_s


class RangeError(FleetError):
    """The bytes that a client asked for are beyond the end.

    Attributes:
        size: bytes that there are.
    """

    status = 416
    title = "Range not satisfiable"

    def __init__(self, size: int) -> None:
        super().__init__("range", f"there are {size} bytes: ask for a range of these")
        self.size = size


class TooLargeError(FleetError):
    """An upload or a value is larger than the settings allow."""

    status = 413
    title = "Too large"


class UnavailableError(FleetError):
    """A part the server needs (database, broker, disk) is not there now."""

    status = 503
    title = "Not available now"
