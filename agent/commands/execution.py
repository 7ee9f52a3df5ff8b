"""What carrying out a command looks like to who watches over it: steps, an end, and how it may be refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from agent.protocol.commands import CommandPhase, CommandResult


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        phase: one that is an end.
        code: why it failed; empty when it did not.
        detail: a sentence for people.
        result: what came of it.
    """

    phase: CommandPhase
    code: str = ""
    detail: str = ""
    result: CommandResult | None = None


class RefusedError(Exception):
    """A command is not begun.

    Attributes:
        code: short and stable.
        detail: a sentence with the remedy.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


class Execution(Protocol):
    """A command that is being carried out. Called by the supervisor's main loop: nothing in it may wait."""

    def step(self, now: float) -> Outcome | None:
        """Go on; how it ended, once it has.

        Args:
            now: of a clock that is never set, in seconds.
        """
        ...

    def end(self) -> Outcome | None:
        """Leave it off: its time is over, or nobody wants it any more. An outcome where it is good as it is."""
        ...
