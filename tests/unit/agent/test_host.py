"""What is measured of the device itself, on files that Linux would show."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.telemetry.host import HostMeter, busy_and_total, memory_kb, own_memory_mb

STAT = "cpu  100 10 40 800 50 3 2 5 30 4\ncpu0 1 2 3\n"


def test_waiting_for_a_disk_is_idle_and_what_guests_use_is_not_counted_twice() -> None:
    assert busy_and_total(STAT) == (160, 1010)


def test_how_busy_the_processors_were_is_of_the_time_since_the_last_look(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text(STAT)
    meter = HostMeter(tmp_path, ())
    assert meter.cpu_percent() == 0.0, "no time has passed"
    (tmp_path / "stat").write_text("cpu  150 10 40 850 50 3 2 5 30 4\n")
    assert meter.cpu_percent() == 50.0


def test_the_hottest_sensor_counts_and_zones_only_where_there_is_no_sensor(tmp_path: Path) -> None:
    hardware, zones = tmp_path / "hwmon", tmp_path / "thermal"
    (zones / "thermal_zone0").mkdir(parents=True)
    (zones / "thermal_zone0" / "temp").write_text("61000\n")
    (hardware / "hwmon0").mkdir(parents=True)
    sensors = ((str(hardware), "hwmon*/temp*_input"), (str(zones), "thermal_zone*/temp"))
    assert HostMeter(sensors=sensors).hottest_c() == 61.0
    for name, text in {"temp1": "45500", "temp2": "-273000", "temp3": "broken", "temp4": "255000"}.items():
        (hardware / "hwmon0" / f"{name}_input").write_text(f"{text}\n")
    meter = HostMeter(sensors=sensors)
    assert meter.hottest_c() == 45.5
    (hardware / "hwmon0" / "temp1_input").unlink()
    assert meter.hottest_c() is None, "a sensor may go"


def test_this_machine_can_be_measured(tmp_path: Path) -> None:
    host = HostMeter().measure(tmp_path, 10.0)
    assert 0.0 <= host.cpu_percent <= 100.0
    assert host.memory_used_mb > 0
    assert host.disk_free_mb is not None
    assert host.disk_free_mb > 0
    assert host.agent_rss_mb == pytest.approx(own_memory_mb() + 10.0, abs=5.0)


def test_memory_is_read_as_far_as_what_is_available() -> None:
    assert memory_kb("MemTotal: 10 kB\nMemFree: 2 kB\nMemAvailable: 6 kB\nHugePages_Total: x\n") == {
        "MemTotal": 10,
        "MemFree": 2,
        "MemAvailable": 6,
    }
