"""`restart-runtime`: the inference worker replaced, as `agent.inference` does it."""

from __future__ import annotations

from typing import Protocol

from agent.commands.execution import Outcome
from agent.protocol.commands import CommandPhase, CommandResult
from agent.replacement import Replacement

WAITS_S = 60.0


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

    It waits a while for its moment: a command that comes when an agent starts finds a worker that does so too.

    Args:
        runtime: to replace.
        now: of a clock that is never set, in seconds.
    """

    def __init__(self, runtime: Runtime, now: float) -> None:
        self._runtime = runtime
        self._until = now + WAITS_S
        self._replacement: Replacement | None = None

    def step(self, now: float) -> Outcome | None:
        """Begin, or look whether the new one serves what the old one did."""
        if self._replacement is None:
            return self._try(now)
        done = self._replacement
        if not done.over:
            return None
        result = CommandResult(models=tuple(sorted(done.served & done.serves)), took_s=round(done.took_s, 3))
        missing = sorted(done.served - done.serves)
        if missing:
            detail = f"the new process does not serve {', '.join(missing)} yet: see the device's log and problems"
            return Outcome(CommandPhase.FAILED, "not_serving", detail[:1000], result)
        return Outcome(CommandPhase.SUCCEEDED, result=result)

    def _try(self, now: float) -> Outcome | None:
        why = self._runtime.replace()
        if not why:
            self._replacement = self._runtime.replacement
            return None
        return Outcome(CommandPhase.FAILED, "busy", why) if now >= self._until else None

    def end(self) -> Outcome | None:
        """What has begun goes on: a half of it is worse than the whole."""
        return None
