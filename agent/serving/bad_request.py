"""What is wrong with a request: in words, and for programs the field at fault."""

from __future__ import annotations

import re
from typing import Self

_JSON_PATH = re.compile(r" - at `\$([^`]*)`$")  # as msgspec has it: `$.inputs[...].shape`
_JSON_PART = re.compile(r"\w+")


class BadRequestError(Exception):
    """The request does not fit the model; the message names the field and what is expected.

    Args:
        message: in words.
        field: the same field for programs: the way to it in the request, tensors by their names, as far as it is known.

    Attributes:
        status: of HTTP, that says so.
        field: such as `inputs`, `x`, `shape`; empty where no field is at fault.
    """

    status = 400

    def __init__(self, message: str, *field: str) -> None:
        super().__init__(message)
        self.field = field

    def within(self, *place: str) -> Self:
        """The same error, of a field that lies there."""
        self.field = (*place, *self.field)
        return self


def json_field(error: Exception) -> tuple[str, ...]:
    """The field that a decoder of JSON complains of; none where it says none."""
    found = _JSON_PATH.search(str(error))
    return tuple(_JSON_PART.findall(found[1])) if found else ()
