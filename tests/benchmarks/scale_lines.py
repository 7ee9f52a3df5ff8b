"""Straight lines through what was measured at several sizes of a fleet, as a table and a plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

Quantity = tuple[str, str]  # what was going on, and what of it
FAR = (100_000, 1_000_000)
FULL = 0.7  # of a processor, what a process that is one thread should take in the long run
DAY_S = 86_400
PLOTTED = (
    ("connect storm", "server CPU s, less telemetry"),
    ("rollout", "server CPU s, less telemetry"),
    ("telemetry", "server CPU"),
    ("telemetry", "broker CPU"),
    ("telemetry", "database CPU"),
    ("memory", "broker"),
)


@dataclass(frozen=True)
class Measured:
    """One size.

    Attributes:
        devices: how many there were.
        tls: whether they connected by mutual TLS.
        found: what was measured.
        lost_updates: devices that did not end on the version that was sent to all.
        lost_samples: telemetry batches that were acknowledged and are not stored.
        repeated_samples: rows that are more than the batches that were sent.
    """

    devices: int
    tls: bool
    found: dict[Quantity, float]
    lost_updates: int
    lost_samples: int
    repeated_samples: int

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "found": [[*key, value] for key, value in self.found.items()]}

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> Self:
        """What `plain` gave."""
        return cls(**{**plain, "found": {(phase, what): value for phase, what, value in plain["found"]}})


@dataclass(frozen=True)
class Line:
    """How something grows with the fleet: `base + slope * devices`.

    Attributes:
        off: how far the measurement furthest from the line is from it, as a share of the largest one.
    """

    phase: str
    what: str
    tls: bool
    base: float
    slope: float
    off: float

    def at(self, devices: float) -> float:
        """Where the line leads."""
        return self.base + self.slope * devices


def less_telemetry(found: dict[Quantity, float]) -> None:
    """Add what a connect storm and a rollout took by themselves.

    Telemetry comes all the while, and the longer either takes the more of that; in a storm from those that are there
    already, so as much of it as its windows that were stored by its end.
    """
    storm_s = found["connect storm", "s"]
    usual_windows = found["telemetry", "windows/s"] * storm_s
    came = min(1.0, found["connect storm", "windows"] / usual_windows) if usual_windows else 0.0
    for process in ("server", "broker", "database"):
        idle, steady = found["idle", f"{process} CPU"], found["telemetry", f"{process} CPU"]
        for phase, usual in (("connect storm", idle + (steady - idle) * came), ("rollout", steady)):
            whole = found[phase, f"{process} CPU s"]
            found[phase, f"{process} CPU s, less telemetry"] = max(0.0, whole - usual * found[phase, "s"])


def lines(every: Sequence[Measured]) -> list[Line]:
    """A line for each thing that was measured at two sizes or more; by least squares."""
    found = []
    for tls in (False, True):
        of_kind = [one for one in every if one.tls is tls]
        for key in dict.fromkeys(key for one in of_kind for key in one.found):
            points = [(one.devices, one.found[key]) for one in of_kind if key in one.found]
            if len({devices for devices, _ in points}) < 2:
                continue
            x, y = np.array(points, float).T
            slope, base = np.polyfit(x, y, 1)
            largest = float(np.abs(y).max())
            off = float(np.abs(base + slope * x - y).max()) / largest if largest else 0.0
            found.append(Line(*key, tls, float(base), float(slope), off))
    return found


def markdown(every: Sequence[Measured], found: Sequence[Line]) -> str:
    """What was measured, and where the lines lead, as tables."""
    text = []
    for tls in (False, True):
        of_kind = [one for one in every if one.tls is tls]
        if not of_kind:
            continue
        text.append(f"\n{'Mutual TLS' if tls else 'Without TLS'}:\n")
        sizes = "".join(f" {one.devices:,} |" for one in of_kind)
        far = "".join(f" {devices:,} |" for devices in FAR)
        text.append(f"| |{sizes} of 1,000 more | off the line |{far}")
        text.append("|---" * (len(of_kind) + 3 + len(FAR)) + "|")
        for key in dict.fromkeys(key for one in of_kind for key in one.found):
            cells = "".join(f" {_shown(one.found.get(key))} |" for one in of_kind)
            line = next((one for one in found if (one.phase, one.what, one.tls) == (*key, tls)), None)
            if line is not None:
                cells += f" {_shown(line.slope * 1000)} | {line.off:.0%} |"
                cells += "".join(f" {_shown(line.at(devices))} |" for devices in FAR)
            text.append(f"| {key[0]}: {key[1]} |{cells}")
    return "\n".join(text) + "\n"


def asked_for(found: Sequence[Line], *, tls: bool, interval_s: float) -> str:
    """What the lines ask for of servers, brokers and database with as many devices as nobody has measured, as a table.

    A server's messages and a broker's connections are each one thread's work, so there are to be as many of them as
    keep each at `FULL` of a processor while telemetry comes.

    Args:
        found: the lines.
        tls: those of connections by mutual TLS.
        interval_s: of telemetry when they were measured.
    """
    known = {(one.phase, one.what): one for one in found if one.tls is tls}
    heading = "".join(f" {devices:,} |" for devices in FAR)
    text = [f"| windows each {interval_s:g} s |{heading}", "|---" * (len(FAR) + 1) + "|"]

    def row(name: str, key: Quantity, of: Callable[[float, int], str]) -> None:
        line = known.get(key)
        if line is not None:
            text.append(f"| {name} |" + "".join(f" {of(line.at(devices), devices)} |" for devices in FAR))

    def processes(busy: float, _devices: int) -> str:
        return f"{max(1, math.ceil(busy / FULL)):,}"

    def each(key: Quantity) -> Callable[[float, int], str]:
        """Minutes of what all do at once, where as many share it as telemetry asks for."""

        def shown(seconds: float, devices: int) -> str:
            line = known.get(key)
            shared = max(1, math.ceil(line.at(devices) / FULL)) if line is not None else 1
            return _shown(seconds / shared / 60)

        return shown

    def gb_a_day(rate: float, _devices: int) -> str:
        return _shown(rate * DAY_S / 1e9)

    servers, brokers, database = (("telemetry", f"{one} CPU") for one in ("server", "broker", "database"))
    row("servers, for telemetry", servers, processes)
    row("brokers, for telemetry", brokers, processes)
    row("processors of the database, for telemetry", database, processes)
    row("memory of all brokers, GB", ("memory", "broker"), lambda mb, _: _shown(mb / 1024))
    row("windows on the database's disk, GB a day", ("telemetry", "disk bytes/s"), gb_a_day)
    storm = "connect storm"
    row(
        "everybody connects anew, minutes of each of those servers",
        (storm, "server CPU s, less telemetry"),
        each(servers),
    )
    row(
        "everybody connects anew, minutes of each of those brokers",
        (storm, "broker CPU s, less telemetry"),
        each(brokers),
    )
    row(
        "a version goes to all, minutes of each of those servers",
        ("rollout", "server CPU s, less telemetry"),
        each(servers),
    )
    return "\n".join(text) + "\n"


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def plot(every: Sequence[Measured], found: Sequence[Line], path: Path) -> None:
    """Points and lines, a panel a quantity, as SVG."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "shoal"
    mpl.rcParams["svg.fonttype"] = "none"  # text is text: the file is a fifth
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    for key, panel in zip(PLOTTED, panels.flat, strict=True):
        for tls, color, label in ((False, "tab:blue", "no TLS"), (True, "tab:orange", "mutual TLS")):
            points = [(one.devices, one.found[key]) for one in every if one.tls is tls and key in one.found]
            if points:
                panel.plot(*zip(*points, strict=True), "o", color=color, label=label)
            for line in found:
                if (line.phase, line.what, line.tls) == (*key, tls):
                    most = max(devices for devices, _ in points)
                    panel.plot([0, most], [line.at(0), line.at(most)], "-", color=color)
        unit = {"telemetry": "processors", "memory": "MB"}.get(key[0], "s of a processor")
        panel.set(title=f"{key[0]}: {key[1].removesuffix(' s')}", xlabel="devices", ylabel=unit)
        panel.set_ylim(bottom=0)
        panel.set_xlim(left=0)
    panels.flat[0].legend()
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)
