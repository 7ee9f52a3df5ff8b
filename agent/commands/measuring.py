"""`facts`: the hardware and runtimes measured again, in a thread: drivers are asked, which takes seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable

import msgspec

from agent.commands.execution import Outcome
from agent.protocol.commands import CommandPhase, CommandResult
from agent.protocol.facts import DeviceFacts


class MeasuringFacts:
    """One measurement.

    Args:
        measure: gives the facts; called from a thread.
        take: takes them in, and gives the names of those that are others now; called by `step`.
    """

    def __init__(self, measure: Callable[[], DeviceFacts], take: Callable[[DeviceFacts], tuple[str, ...]]) -> None:
        self._measure, self._take = measure, take
        self._found: list[DeviceFacts | Exception] = []
        threading.Thread(target=self._work, name="facts", daemon=True).start()

    def _work(self) -> None:
        try:
            self._found.append(self._measure())
        except Exception as error:  # noqa: BLE001 (carried over to the main loop)
            self._found.append(error)

    def step(self, now: float) -> Outcome | None:  # noqa: ARG002
        """Whether it is done."""
        if not self._found:
            return None
        found = self._found[0]
        if isinstance(found, Exception):
            return Outcome(CommandPhase.FAILED, "facts_failed", f"{type(found).__name__}: {str(found)[:500]}")
        return Outcome(CommandPhase.SUCCEEDED, result=CommandResult(changed=self._take(found)))

    def end(self) -> Outcome | None:
        """What is measured is thrown away."""
        self._take = lambda _facts: ()
        return None


def changed(before: DeviceFacts, after: DeviceFacts) -> tuple[str, ...]:
    """Names of facts that differ."""
    old, new = msgspec.to_builtins(before), msgspec.to_builtins(after)
    return tuple(name for name in new if old.get(name) != new[name])
