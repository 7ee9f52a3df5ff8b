"""How the device itself is: CPU, memory, temperature, disk, as Linux tells it. None where it can't be measured.

Files are read directly: an idle device pays for this at each telemetry window, and a worker for each import.
"""

from __future__ import annotations

import os
from pathlib import Path

from agent.protocol.messages import HostWindow

SENSORS = (("/sys/class/hwmon", "hwmon*/temp*_input"), ("/sys/class/thermal", "thermal_zone*/temp"))


class HostMeter:
    """Measures the device, again and again.

    Args:
        proc: where the kernel tells of processes and memory.
        sensors: folders with patterns of files that hold a temperature in thousandths of a degree. The first that
            has any counts.
    """

    def __init__(self, proc: Path = Path("/proc"), sensors: tuple[tuple[str, str], ...] = SENSORS) -> None:
        self._proc = proc
        self._sensors = next((found for place, what in sensors if (found := sorted(Path(place).glob(what)))), [])
        self._before = self._times()

    def hottest_c(self) -> float | None:
        """The highest temperature of any sensor, in degrees Celsius."""
        values = [int(text) / 1000 for one in self._sensors if (text := _text(one).strip()).lstrip("-").isdigit()]
        return max((value for value in values if 0 < value < 150), default=None)

    def cpu_percent(self) -> float:
        """How busy all processors were since the last call, or since this was made."""
        before, self._before = self._before, self._times()
        busy, total = (now - then for now, then in zip(self._before, before, strict=True))
        return 100 * busy / total if total > 0 else 0.0

    def measure(self, state_dir: Path, worker_rss_mb: float) -> HostWindow:
        """The device now; CPU is the mean since the last call.

        Args:
            state_dir: whose free disk counts.
            worker_rss_mb: resident memory of the inference worker, in MiB.
        """
        memory = memory_kb(_text(self._proc / "meminfo"))
        disk = os.statvfs(state_dir)
        return HostWindow(
            cpu_percent=self.cpu_percent(),
            memory_used_mb=(memory["MemTotal"] - memory["MemAvailable"]) / 1024,
            agent_rss_mb=own_memory_mb() + worker_rss_mb,
            temperature_c=self.hottest_c(),
            disk_free_mb=disk.f_bavail * disk.f_frsize / 2**20,
        )

    def _times(self) -> tuple[int, int]:
        return busy_and_total(_text(self._proc / "stat"))


def busy_and_total(stat: str) -> tuple[int, int]:
    """Of all processors since the machine started, in clock ticks, of the text of /proc/stat."""
    # user, nice, system, idle, iowait, irq, softirq, steal; what follows is counted in the first two already
    ticks = [int(one) for one in stat.partition("\n")[0].split()[1:9]]
    return sum(ticks) - sum(ticks[3:5]), sum(ticks)


def memory_kb(meminfo: str) -> dict[str, int]:
    """The first lines of the text of /proc/meminfo, up to what is available, in KiB."""
    found = {}
    for line in meminfo.splitlines():
        name, _, value = line.partition(":")
        found[name] = int(value.split()[0])
        if name == "MemAvailable":
            break
    return found


def own_memory_mb() -> float:
    """Resident memory of this process, in MiB."""
    return int(_text(Path("/proc/self/statm")).split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def free_memory_mb(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """What may still be allocated here without swapping, in MiB: of the machine, and of the control groups around us.

    Args:
        root: where control groups (version 2) are mounted.
        own: names the one of this process.
    """
    free = float(memory_kb(_text(Path("/proc/meminfo")))["MemAvailable"] * 1024)
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


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
