"""Which ensembles have not been servable for a while, as the worker says it: pure. Used by the supervisor."""

from __future__ import annotations

from collections.abc import Callable, Mapping

HOLD_S = 5.0  # a worker that has just begun, or a version that is exchanged, is no problem of the device


class EnsembleHealth:
    """What holds now.

    Args:
        tell: takes a name, and what keeps that ensemble from being served; None when nothing does any more.
    """

    def __init__(self, tell: Callable[[str, str | None], None]) -> None:
        self._tell = tell
        self._why: dict[str, str] = {}
        self._since: dict[str, float] = {}
        self._told: dict[str, str] = {}

    @property
    def busy(self) -> bool:
        """Whether something is to be told soon."""
        return any(self._told.get(name) != why for name, why in self._why.items())

    def said(self, problems: Mapping[str, str], now: float) -> None:
        """Take the worker's word.

        Args:
            problems: by name, what keeps an ensemble from being served.
            now: seconds, of a clock that is never set.
        """
        self._why = dict(problems)
        self._since = {name: self._since.get(name, now) for name in problems}
        for name in [one for one in self._told if one not in problems]:
            del self._told[name]
            self._tell(name, None)

    def tick(self, now: float) -> None:
        """Tell what has held for a while."""
        for name, why in self._why.items():
            if self._told.get(name) != why and now - self._since[name] >= HOLD_S:
                self._told[name] = why
                self._tell(name, why)
