"""Straight lines through sizes of a fleet: cost of a device, how straight it is, and where it leads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks.scale_lines import PLOTTED, Measured, Quantity, asked_for, less_telemetry, lines, markdown, plot


def of(devices: int, value: float, *, tls: bool = False) -> Measured:
    return Measured(devices, tls, dict.fromkeys(PLOTTED, value), 0, 0, 0)


def test_a_straight_line_is_found_and_followed() -> None:
    found = lines([of(1000, 12.0), of(3000, 16.0), of(10_000, 30.0)])
    assert [(one.phase, one.what) for one in found] == list(PLOTTED)
    assert (found[0].base, found[0].slope) == (pytest.approx(10), pytest.approx(0.002))
    assert found[0].off == pytest.approx(0, abs=1e-9)
    assert found[0].at(1_000_000) == pytest.approx(2010)


def test_what_does_not_grow_evenly_is_told() -> None:
    (line, *_) = lines([of(1000, 1.0), of(2000, 4.0), of(3000, 9.0)])
    assert 0.05 < line.off < 0.1


def test_one_size_makes_no_line_and_kinds_are_kept_apart() -> None:
    assert lines([of(1000, 1.0)]) == []
    assert lines([of(1000, 1.0), of(2000, 2.0, tls=True)]) == []
    found = lines([of(1, 1.0), of(2, 2.0), of(1, 3.0, tls=True), of(2, 5.0, tls=True)])
    assert {(one.tls, round(one.slope, 6)) for one in found} == {(False, 1.0), (True, 2.0)}


def test_figures_are_kept_and_read_again() -> None:
    measured = of(1000, 1.5, tls=True)
    assert Measured.of_plain(json.loads(json.dumps(measured.plain()))) == measured


def test_what_is_told_without_the_telemetry_that_comes_meanwhile() -> None:
    found: dict[Quantity, float] = {("rollout", "s"): 20.0, ("connect storm", "s"): 10.0}
    found["telemetry", "windows/s"], found["connect storm", "windows"] = 30.0, 75  # a quarter of 10 s of telemetry
    for process, idle, usual, storm, rollout in (
        ("server", 0.1, 0.5, 7.0, 14.0),
        ("broker", 0.0, 0.1, 1.0, 2.5),
        ("database", 0.2, 0.2, 1.0, 3.0),
    ):
        found["idle", f"{process} CPU"], found["telemetry", f"{process} CPU"] = idle, usual
        found["connect storm", f"{process} CPU s"], found["rollout", f"{process} CPU s"] = storm, rollout
    less_telemetry(found)

    def told(phase: str) -> list[float]:
        return [found[phase, f"{one} CPU s, less telemetry"] for one in ("server", "broker", "database")]

    assert told("rollout") == [pytest.approx(4.0), pytest.approx(0.5), 0.0]
    assert told("connect storm") == [pytest.approx(5.0), pytest.approx(0.75), 0.0]


def test_tables_and_plot_have_every_size(tmp_path: Path) -> None:
    every = [of(1000, 1.0), of(3000, 3.0), of(1000, 2.0, tls=True), of(3000, 6.0, tls=True)]
    text = markdown(every, lines(every))
    assert "| | 1,000 | 3,000 | of 1,000 more | off the line | 100,000 | 1,000,000 |" in text
    assert "| connect storm: server CPU s, less telemetry | 1 | 3 | 1 | 0% | 100 | 1,000 |" in text
    assert "Mutual TLS" in text
    plot(every, lines(every), tmp_path / "scale.svg")
    assert (tmp_path / "scale.svg").read_text().count("axes_") >= len(PLOTTED)


def test_what_far_more_devices_ask_for() -> None:
    every = [of(1000, 0.034), of(3000, 0.102)]  # 0.034 of a processor, or s, or MB, of 1,000 devices
    text = asked_for(lines(every), tls=False, interval_s=30)
    assert "| windows each 30 s | 100,000 | 1,000,000 |" in text
    assert "| servers, for telemetry | 5 | 49 |" in text
    assert "| brokers, for telemetry | 5 | 49 |" in text
    assert "| everybody connects anew, minutes of each of those servers | 0.0113 | 0.0116 |" in text
    assert len(asked_for(lines(every), tls=True, interval_s=30).splitlines()) == 2, "nothing was measured"
