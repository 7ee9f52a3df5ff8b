"""What people typed into forms, as the API takes it."""

from __future__ import annotations

import math
from urllib.parse import parse_qsl

from fastapi import Request

LONGEST = 256 << 10  # bytes


class Form:
    """Fields of one form: of several with the same name, all.

    Args:
        pairs: names and what was typed.
    """

    def __init__(self, pairs: list[tuple[str, str]]) -> None:
        self._pairs = pairs

    def text(self, name: str) -> str:
        """What was typed, without blanks around; empty where nothing was."""
        return next((value.strip() for key, value in self._pairs if key == name), "")

    def texts(self, name: str) -> list[str]:
        """What was typed into all fields of a name, and is not empty."""
        return [value.strip() for key, value in self._pairs if key == name and value.strip()]

    def all(self, name: str) -> list[str]:
        """What was typed into all fields of a name, empty ones too: rows of a table."""
        return [value.strip() for key, value in self._pairs if key == name]

    def number(self, name: str) -> float | str | None:
        """A number; what was typed where it is none, for the API to say so; None where nothing was."""
        return number(self.text(name))

    def checked(self, name: str) -> bool:
        """Whether a box is ticked."""
        return bool(self.text(name))


def number(text: str) -> float | str | None:
    """A number; the text where it is none that JSON has; None for nothing."""
    if not text:
        return None
    try:
        found = float(text)
    except ValueError:
        return text
    return found if math.isfinite(found) else text


async def read_form(request: Request) -> Form:
    """The fields that a page sent; what is too long is nothing."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > LONGEST:
            return Form([])
    return Form(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=2000))
