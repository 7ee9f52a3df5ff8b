"""How long each node of a net takes: ONNX Runtime's own timings of nodes, scaled to the time of the optimized net."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from agent.trial.dataset import Array
from converters.sharding.graph import open_session

RUNS = 7
BUDGET_S = 10.0
_KERNEL = "_kernel_time"


def node_seconds(model: Any, row: dict[str, Array]) -> dict[str, float]:
    """Seconds of every node for one row, by its name; together they take as long as the optimized net.

    Nodes are timed as they are, since an optimized net's have other names; the shares are theirs, the sum is not.

    Args:
        model: tidied: its nodes have names of their own.
        row: one row of inputs.

    Raises:
        ConversionError: `bad_model`, when it does not load.
    """
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(model, plain=True, profile=str(Path(folder) / "profile"))
        _repeat(session, row)
        events = json.loads(Path(session.end_profiling()).read_bytes())
    taken: dict[str, list[int]] = {}
    for event in events:
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith(_KERNEL):
            taken.setdefault(name.removesuffix(_KERNEL), []).append(int(event.get("dur", 0)))
    found = {name: statistics.median(times) * 1e-6 for name, times in taken.items()}
    total = sum(found.values())
    scale = seconds_of(model, row) / total if total else 1.0
    return {name: seconds * scale for name, seconds in found.items()}


def seconds_of(model: Any, row: dict[str, Array]) -> float:
    """Median seconds of one run of an optimized net."""
    return statistics.median(_repeat(open_session(model, plain=False), row))


def _repeat(session: Any, row: dict[str, Array]) -> list[float]:
    session.run(None, row)
    found: list[float] = []
    begun = time.perf_counter()
    while len(found) < RUNS and time.perf_counter() - begun < BUDGET_S:
        start = time.perf_counter()
        session.run(None, row)
        found.append(time.perf_counter() - start)
    return found
