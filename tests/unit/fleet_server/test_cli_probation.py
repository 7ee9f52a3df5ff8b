"""How the command line reads and shows probation."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import typer

from agent.protocol.messages import ProbationReport
from fleet_server.cli.probation import parse, seen
from fleet_server.domain.strategy import ProbationSpec


def test_what_is_written_is_what_the_server_takes() -> None:
    text = "1m, at-most=1h,requests=50,errors=5,latency=1.5,memory=200,growth=0,replace"
    spec = ProbationSpec.model_validate(parse(text))
    assert (spec.seconds, spec.at_most_s, spec.minimum_requests, spec.error_percent) == (60, 3600, 50, 5)
    assert (spec.latency_p95_ratio, spec.memory_mb, spec.growth_mb) == (1.5, 200, 0)
    assert spec.on_memory_short == "replace"
    assert parse("90") == {"seconds": 90.0}


@pytest.mark.parametrize("text", ["", "soon", "60s,errors", "60s,errors=few", "60s,wishes=3", "60s,at-most=never"])
def test_what_can_not_be_read_ends_with_usage(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended:
        parse(text)
    assert ended.value.exit_code == 2
    assert "--probation: " in capsys.readouterr().err


def row(**fields: Any) -> dict[str, Any]:
    return {"probation": msgspec.to_builtins(ProbationReport(**fields))}


def test_what_was_seen_in_a_few_words() -> None:
    assert seen({"probation": None}) is None
    good = row(requests=120, latency_p95_ms=11.0, before_p95_ms=10.0, exercised=True)
    assert seen(good) == "120 requests, p95 ×1.10"
    bad = row(requests=9, errors=3, rejected=2, note="it runs on cpu, because cuda can't be used here")
    assert seen(bad) == (
        "9 requests, 3 errors, 2 refused, not exercised, it runs on cpu, because cuda can't be used here"
    )
