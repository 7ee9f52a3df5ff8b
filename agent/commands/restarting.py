"""`restart-runtime`: the inference worker replaced, as `agent.inference` does it."""

from __future__ import annotations

from typing import Protocol

from agent.commands.execution import Outcome, RefusedError
from agent.protocol.commands import CommandPhase, CommandResult
from agent.replacement import Replacement


class Runtime(Protocol):
    """What can be replaced."""

    @property
    def replacement(self) -> Replacement | None:
        """The last one, going on or over."""
        ...

    def replace(self) -> str:
        """Begin; why it is not done now, in a sentence, or empty when it has begun."""
        ...


class Restarting:
    """One replacement.

    Args:
        runtime: to replace.

    Raises:
        RefusedError: when it is no moment for it.
    """

    def __init__(self, runtime: Runtime) -> None:
        why = runtime.replace()
        if why:
            raise RefusedError("busy", why)
        assert runtime.replacement is not None
        self._replacement = runtime.replacement

    def step(self, now: float) -> Outcome | None:  # noqa: ARG002
        """Whether the new one serves what the old one did."""
        done = self._replacement
        if not done.over:
            return None
        result = CommandResult(models=tuple(sorted(done.served & done.serves)), took_s=round(done.took_s, 3))
        missing = sorted(done.served - done.serves)
        if missing:
            detail = f"the new process does not serve {', '.join(missing)} yet: see the device's log and problems"
            return Outcome(CommandPhase.FAILED, "not_serving", detail[:1000], result)
        return Outcome(CommandPhase.SUCCEEDED, result=result)

    def end(self) -> Outcome | None:
        """It goes on: a half of it is worse than the whole."""
        return None
