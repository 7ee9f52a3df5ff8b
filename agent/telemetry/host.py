"""How the device itself is: CPU, memory, temperature, disk. None where it can't be measured."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil

from agent.protocol.messages import HostWindow


def hottest_c() -> float | None:
    """The highest temperature of any sensor, in degrees Celsius."""
    sensors = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    values = [reading.current for readings in sensors.values() for reading in readings if 0 < reading.current < 150]
    return max(values, default=None)


def measure_host(state_dir: Path, worker_rss_mb: float) -> HostWindow:
    """The device now; CPU is the mean since the last call.

    Args:
        state_dir: whose free disk counts.
        worker_rss_mb: resident memory of the inference worker, in MiB.
    """
    own = psutil.Process().memory_info().rss / 2**20
    return HostWindow(
        cpu_percent=psutil.cpu_percent(),
        memory_used_mb=psutil.virtual_memory().used / 2**20,
        agent_rss_mb=own + worker_rss_mb,
        temperature_c=hottest_c(),
        disk_free_mb=shutil.disk_usage(state_dir).free / 2**20,
    )
