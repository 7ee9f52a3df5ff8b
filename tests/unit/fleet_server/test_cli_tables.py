"""Tables of candidates in a terminal of 80 characters: numbers stay whole, and sentences can be read."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console, RenderableType

from fleet_server.cli import candidates, gates

RECIPE = "onnx-sums-dynamic-matmul-channels-s7"
FATE = "not built: the net has no layer that this recipe would quantize"


def printed(found: RenderableType, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(found)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def candidate(**changes: Any) -> dict[str, Any]:
    measured = {"size": 287_670, "accuracy": 0.98765, "latency_p50_ms": 0.0246312}
    return {"recipe": RECIPE, "precision": "fp32", "measurements": measured, "fate": "picked", **changes}


def test_fates_of_candidates_have_room() -> None:
    rows = [candidate(), candidate(measurements=None, fate=FATE)]
    narrow = printed(candidates.table(rows, 80), 80)
    assert len(narrow.splitlines()) <= 8, narrow
    for said in ("0.2877", "98.77", "0.02463", "picked", "not built"):
        assert said in narrow
    wide = printed(candidates.table(rows, 200), 200)
    assert any(RECIPE in line and FATE in line for line in wide.splitlines())


def test_what_devices_measured_is_not_broken() -> None:
    times = {"latency_p50_ms": 0.0171712, "latency_p95_ms": 0.06781, "latency_p99_ms": 1.8351}
    row = {"recipe": RECIPE, "device": "agent-1", "provider": "cpu", "failure": None, "accuracy": 0.98765, **times}
    rows = [{**row, "peak_memory_mb": 28.2, "load_s": 0.163}] * 2
    for several, width in ((False, 80), (True, 80), (True, 120)):
        shown = [{**one, "device": f"agent-{number}"} if several else one for number, one in enumerate(rows)]
        lines = printed(gates.measurements(shown, width), width).splitlines()
        for numbers in (("0.01717", "0.06781", "1.835"), ("98.77", "28.2", "0.163")):
            assert sum(all(one in line for one in numbers) for line in lines) == 2
        assert any("agent-1" in line for line in lines) is several
