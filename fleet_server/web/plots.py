"""Answers of the API as plots have them: times, and a row of values for each line. Pure."""

from __future__ import annotations

import datetime as dt
from typing import Any

from fleet_server.domain.candidates import quality_of
from fleet_server.web.api import Json

Plot = dict[str, Any]
LINES = {
    "latency": (("p50", "latency_p50_ms"), ("p95", "latency_p95_ms"), ("p99", "latency_p99_ms")),
    "requests": (("requests", "requests"), ("errors", "errors"), ("refused", "rejected")),
    "accuracy": (("accuracy", "accuracy"),),
}


def series(answer: Json, what: str) -> Plot:
    """Points of a telemetry series.

    Args:
        answer: of the API.
        what: one of `LINES`.
    """
    return _lines(answer["points"], *LINES[what])


def hosts(windows: list[Json]) -> dict[str, Plot]:
    """How a device itself was, by what was measured; the windows come newest first."""
    rows = windows[::-1]

    def lines(*names: tuple[str, str]) -> Plot:
        found = _lines(rows, *names)
        some = any(value is not None for one in found["series"] for value in one["values"])
        return found if some else found | {"at": []}

    return {
        "temperature": lines(("temperature", "temperature_c")),
        "cpu": lines(("processor", "cpu_percent")),
        "memory": lines(("used", "memory_used_mb"), ("agent", "agent_rss_mb")),
        "disk": lines(("free", "disk_free_mb")),
    }


def history(answer: Json) -> dict[str, Plot]:
    """A fleet over time: devices, and what all models did."""
    points = answer["points"]
    return {
        "devices": _lines(points, ("online", "online"), ("all", "devices")),
        "requests": _lines(points, ("requests", "requests"), ("errors", "errors")),
        "latency": _lines(points, *LINES["latency"]),
    }


def versions_over_time(answer: Json, most: int = 6) -> Plot:
    """Devices by the version that answers there: those that most devices had at some time, the rest together."""
    points = [point for point in answer["points"] if point["versions"] is not None]
    counts = [{f"{one['model']}@{one['version']}": one["devices"] for one in point["versions"]} for point in points]
    largest: dict[str, int] = {}
    for count in counts:
        for name, devices in count.items():
            largest[name] = max(largest.get(name, 0), devices)
    named = sorted(largest, key=lambda name: -largest[name])[:most]
    series_of = [{"label": name, "values": [count.get(name, 0) for count in counts]} for name in sorted(named)]
    if len(largest) > most:
        rest = [sum(devices for name, devices in count.items() if name not in named) for count in counts]
        series_of.append({"label": "others", "values": rest})
    return {"at": [seconds(point["at"]) for point in points], "series": series_of}


def _lines(rows: list[Json], *names: tuple[str, str]) -> Plot:
    """A line for each name in the rows, with its label."""
    return {
        "at": [seconds(row["at"]) for row in rows],
        "series": [{"label": label, "values": [row[name] for row in rows]} for label, name in names],
    }


def seconds(value: str) -> float:
    """A time of the API in seconds since 1970."""
    return dt.datetime.fromisoformat(value).timestamp()


def scatter(candidates: list[Json], width: float = 620.0, height: float = 280.0) -> Plot | None:
    """Quality against latency of a variant's candidates, as places in a picture; None where fewer than two have both.

    Args:
        candidates: of a variant.
        width: of the picture.
        height: of the picture.
    """
    measured = [one for one in candidates if one.get("measurements")]
    quality = quality_of(measured)
    found: list[tuple[Json, float, float]] = [
        (one, one["measurements"]["latency_p50_ms"], one["measurements"][quality])
        for one in measured
        if one["measurements"].get("latency_p50_ms") is not None and one["measurements"].get(quality) is not None
    ]
    if len(found) < 2:
        return None
    left, right, top, bottom = 64.0, width - 12, 12.0, height - 38
    slowest = float(max(latency for _, latency, _ in found) * 1.1) or 1.0
    worst, best = min(value for _, _, value in found), max(value for _, _, value in found)
    space = (best - worst) * 0.15 or 0.01
    worst, best = max(0.0, worst - space), min(1.0, best + space)

    def across(latency: float) -> float:
        return left + (right - left) * latency / slowest

    def up(value: float) -> float:
        return bottom - (bottom - top) * (value - worst) / ((best - worst) or 1.0)

    return {
        "quality": quality,
        "width": width,
        "height": height,
        "left": left,
        "right": right,
        "top": top,
        "bottom": bottom,
        "points": [{"x": across(latency), "y": up(value), "one": one} for one, latency, value in found],
        "across": [(across(slowest * part / 4), slowest * part / 4) for part in range(5)],
        "up": [(up(worst + (best - worst) * part / 4), worst + (best - worst) * part / 4) for part in range(5)],
    }


def band(figure: Json | None, low: float, high: float) -> Json | None:
    """Where a figure with its interval lies between two ends, in per cent; None where there is no figure."""
    if figure is None:
        return None
    width = (high - low) or 1.0

    def place(value: float) -> float:
        return min(100.0, max(0.0, 100 * (value - low) / width))

    return {name: place(figure[name]) for name in ("value", "low", "high")}


def bands(figure: Json) -> Json:
    """A compared figure, and both of its intervals on one scale."""
    sides = [side for side in (figure["now"], figure["before"]) if side is not None]
    low = min((side["low"] for side in sides), default=0.0)
    high = max((side["high"] for side in sides), default=1.0)
    space = (high - low) * 0.1 or abs(high) * 0.1 or 1.0
    ends = (low - space, high + space)
    return figure | {"now_band": band(figure["now"], *ends), "before_band": band(figure["before"], *ends)}
