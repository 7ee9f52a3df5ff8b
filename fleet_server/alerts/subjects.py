"""What an alert is about, and what a look at it found. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Subject(NamedTuple):
    """A device, a model on a device, or a rollout."""

    device_id: str | None = None
    model: str | None = None
    rollout_id: str | None = None

    @property
    def text(self) -> str:
        """As people and silences name it."""
        if self.rollout_id is not None:
            return f"rollout/{self.rollout_id}"
        return f"device/{self.device_id}" + ("" if self.model is None else f"/model/{self.model}")


@dataclass(frozen=True)
class Found:
    """What was found: a value in the metric's unit, and what there is to say beside it."""

    value: float
    detail: str = ""


Findings = dict[Subject, Found]
