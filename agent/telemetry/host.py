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


def own_memory_mb() -> float:
    """Resident memory of this process, in MiB."""
    return float(psutil.Process().memory_info().rss / 2**20)


def free_memory_mb(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """What may still be allocated here without swapping, in MiB: of the machine, and of the control groups around us.

    Args:
        root: where control groups (version 2) are mounted.
        own: names the one of this process.
    """
    free = float(psutil.virtual_memory().available)
    try:
        group = root / own.read_text().rpartition("0::")[2].strip().lstrip("/")
    except OSError:
        return free / 2**20
    while group.is_relative_to(root):
        try:
            limit = int((group / "memory.max").read_text())
            used = int((group / "memory.current").read_text())
            # File pages count as used, but the kernel takes them back.
            pages = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            free = min(free, limit - used + int(pages["inactive_file"]))
        except (OSError, ValueError, KeyError):
            pass  # `max`: no limit; or none of the second version
        group = group.parent
    return max(free, 0.0) / 2**20


def measure_host(state_dir: Path, worker_rss_mb: float) -> HostWindow:
    """The device now; CPU is the mean since the last call.

    Args:
        state_dir: whose free disk counts.
        worker_rss_mb: resident memory of the inference worker, in MiB.
    """
    return HostWindow(
        cpu_percent=psutil.cpu_percent(),
        memory_used_mb=psutil.virtual_memory().used / 2**20,
        agent_rss_mb=own_memory_mb() + worker_rss_mb,
        temperature_c=hottest_c(),
        disk_free_mb=shutil.disk_usage(state_dir).free / 2**20,
    )
