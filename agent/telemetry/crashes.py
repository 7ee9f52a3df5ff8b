"""Counts how often the inference worker died, for the windows of those it is counted for: the worker itself can't."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from agent.protocol.messages import ModelWindow


class Crashes:
    """What was counted since the last window."""

    def __init__(self) -> None:
        self._counted: dict[tuple[str, str], ModelWindow] = {}

    def count(self, model: str, version: str, digest: str, deployment_id: str, provider: str) -> None:
        """The worker died, and it is counted for this artifact."""
        key = (deployment_id, digest)
        before = self._counted.get(key)
        window = before or ModelWindow(model, version, digest, deployment_id, provider)
        self._counted[key] = msgspec.structs.replace(window, crashes=window.crashes + 1)

    def added_to(self, windows: Sequence[ModelWindow]) -> tuple[ModelWindow, ...]:
        """Windows with what was counted; new counts begin. What no worker has loaded any more gets one of its own."""
        counted, self._counted = self._counted, {}
        found = []
        for window in windows:
            mine = counted.pop((window.deployment_id, window.digest), None)
            found.append(msgspec.structs.replace(window, crashes=mine.crashes) if mine else window)
        return (*found, *counted.values())
