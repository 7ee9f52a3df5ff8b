"""Server-sent events (the HTML standard's `text/event-stream`), read line by line. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class ServerEvent:
    """One event.

    Attributes:
        kind: its type; `message` where it has none.
        data: its text.
        id: to go on after it; empty where it has none.
    """

    kind: str
    data: str
    id: str


def read_events(lines: Iterable[str]) -> Iterator[ServerEvent]:
    """The events of a stream's lines; one that is cut off in the middle is none."""
    fields: dict[str, str] = {}
    for line in lines:
        if not line:
            if "data" in fields:
                yield ServerEvent(fields.get("event", "message"), fields["data"], fields.get("id", ""))
            fields = {}
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data" and "data" in fields:
            value = f"{fields['data']}\n{value}"
        if name:  # else it is a comment, by which the server shows that it is there
            fields[name] = value
