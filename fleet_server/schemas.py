"""Shapes that every subject's HTTP schemas share."""

from __future__ import annotations

import datetime as dt
import re
from typing import Annotated, Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

NAME_LENGTH = 64
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN, description="1 to 64 letters, digits, '.', '_' or '-'.")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256, lower-case hexadecimal.")]
PAGE_LIMIT = 500
_NO_TEXT = re.compile("[\x00\ud800-\udfff]")


class Request(BaseModel):
    """Base of what clients send: an unknown field is an error, because it is most likely a misspelt one."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _holds_real_text(cls, value: Any) -> Any:
        """No database holds NUL in a text, and no answer half a surrogate pair."""
        waiting = [value]
        while waiting:
            one = waiting.pop()
            if isinstance(one, dict):
                waiting += [*one.keys(), *one.values()]
            elif isinstance(one, list):
                waiting += one
            elif isinstance(one, str) and _NO_TEXT.search(one):
                raise ValueError("a text holds a NUL character or half a surrogate pair: leave it out")
        return value


class Response(BaseModel):
    """Base of what the server answers."""

    model_config = ConfigDict(frozen=True, from_attributes=True)
    # Fields that do not count for `If-Match` (preconditions.py); None for what nobody changes as a whole.
    observed: ClassVar[frozenset[str] | None] = frozenset()


def example(**fields: Any) -> ConfigDict:
    """A model's configuration with an example of it for the API's description."""
    return ConfigDict(json_schema_extra={"examples": [fields]})


ItemT = TypeVar("ItemT", bound=BaseModel)


class Page(Response, Generic[ItemT]):
    """One page of a list."""

    observed = None

    items: list[ItemT]
    next_cursor: str | None = Field(None, description="Pass as `cursor` for the next page; null on the last one.")


class FieldProblemView(Response):
    """One field of a request, and what is wrong with it."""

    field: str
    detail: str


class Problem(Response):
    """An error (RFC 9457)."""

    type: str
    title: str
    status: int
    code: str = Field(description="Stable, and safe to match on.")
    detail: str = Field(description="A sentence for people that ends in the remedy.")
    request_id: str = Field(description="Under which the server's log has it.")
    problems: list[FieldProblemView] = Field(description="The fields at fault, when there are any.")


class Waiting(Response):
    """Why something stands still on purpose."""

    reason: str = Field(description="`budget`, `download_window`, `activate_window` or `time_zone`.")
    detail: str
    until: dt.datetime | None = Field(description="When it goes on by itself, by the device's clock; null: not known.")


class Failure(Response):
    """Why something did not work, with what would mend it."""

    code: str
    detail: str
