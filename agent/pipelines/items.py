"""What a source gives, and what a model says of it; and what every source promises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from agent.protocol.secrets import hide_secrets


class SourceError(Exception):
    """A source can't go on now; the message says why, and what to do. It is asked again later."""

    def __init__(self, message: str) -> None:
        super().__init__(hide_secrets(message))


@dataclass(frozen=True)
class Progress:
    """How far a source has come: kept in one transaction with the result.

    Attributes:
        key: of what.
        state: how far.
    """

    key: str
    state: str


@dataclass(frozen=True)
class Item:
    """One request to the model.

    Attributes:
        body: of it.
        content_type: of the body.
        about: what it is, as its result says: a file, a frame, a topic, a position.
        headers: more of the request.
        name: the same whenever this very item is taken again; empty where it can't be.
        taken_at: in Unix seconds.
        progress: holds once its result is kept.
        refused_progress: holds where the model takes no such item; None for the same.
        refusal: why it can't even be asked; empty where it can.
        acknowledge: what the source has to know of it again, such as a message's number.
    """

    body: bytes
    content_type: str
    about: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)
    name: str = ""
    taken_at: float = 0.0
    progress: Progress | None = None
    refused_progress: Progress | None = None
    refusal: str = ""
    acknowledge: Any = None


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        model: that answered.
        version: of it.
        outputs: tensors as JSON has them: name, datatype, shape, data.
        arrays: outputs that came in binary, by name.
    """

    model: str
    version: str
    outputs: list[dict[str, Any]]
    arrays: Mapping[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """Gives items, one at a time; all calls come from one thread."""

    @property
    def live(self) -> bool:
        """Whether items that nobody asks for in time are worth nothing: the newest one wins."""

    def next(self, wait_s: float) -> Item | None:
        """The next item; None when there is none in that time.

        Raises:
            SourceError: when it can't go on now.
        """

    def settled(self, item: Item, answer: Answer | None) -> None:
        """An item is done with, and its result is kept; there is no answer where it was refused."""

    def close(self) -> None:
        """Let go of everything; `next` may begin again."""
