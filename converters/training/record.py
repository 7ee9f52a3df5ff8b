"""What a training pass leaves for the lineage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from converters.job import PassRecord
from converters.step import Parameter

__all__ = ["Parameter", "Pass", "recorded", "weight_bytes"]


@dataclass
class Pass:
    """A pass while it runs: it puts what it found into `found`, and its net into `net`."""

    net: Any
    found: dict[str, Parameter] = field(default_factory=dict)


@contextmanager
def recorded(records: list[PassRecord], name: str, net: Any, **parameters: Parameter) -> Iterator[Pass]:
    """Time a pass and add its record; bytes are those of the net's weights before and after."""
    running = Pass(net)
    before, started = weight_bytes(net), time.monotonic()
    yield running
    seconds = round(time.monotonic() - started, 3)
    records.append(PassRecord(name, {**parameters, **running.found}, seconds, before, weight_bytes(running.net)))


def weight_bytes(net: Any) -> int:
    """Bytes of a net's weights; zeros count as any other."""
    return sum(one.numel() * one.element_size() for one in net.parameters())
