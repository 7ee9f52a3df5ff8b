"""Answers of the API as plots have them: times, and a row of values for each line. Pure."""

from __future__ import annotations

import datetime as dt
import math
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


def scatter(candidates: list[Json], width: float = 760.0, height: float = 300.0) -> Plot | None:
    """Quality against latency of a variant's candidates, as places in a picture; None where fewer than two have both.

    A candidate's name stands beside its point where there is room for it; else only the table has it.

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
    left, right, top, bottom = 64.0, width - 24, 16.0, height - 38
    latencies = _round_steps(0.0, max(latency for _, latency, _ in found) * 1.05)
    qualities = _round_steps(min(value for _, _, value in found), max(value for _, _, value in found))
    (fastest, slowest), (worst, best) = (latencies[0], latencies[-1]), (qualities[0], qualities[-1])

    def across(latency: float) -> float:
        return left + (right - left) * (latency - fastest) / (slowest - fastest)

    def up(value: float) -> float:
        return bottom - (bottom - top) * (value - worst) / (best - worst)

    places = [(across(latency), up(value)) for _, latency, value in found]
    labels = _labels(places, [one["recipe"] for one, _, _ in found], (left, top - 12, right + 20, bottom))
    return {
        "quality": quality,
        "width": width,
        "height": height,
        "left": left,
        "right": right,
        "top": top,
        "bottom": bottom,
        "points": [
            {"x": x, "y": y, "one": one, "label": label}
            for (one, _, _), (x, y), label in zip(found, places, labels, strict=True)
        ],
        "across": [(across(value), value) for value in latencies],
        "up": [(up(value), value) for value in qualities],
    }


def _round_steps(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers at equal steps, which begin at or below `low` and end at or above `high`."""
    size = max((high - low) or abs(high) or 1.0, abs(high) / 1000, 1e-9)
    power = 10.0 ** math.floor(math.log10(size / most))
    for step in (power, 2 * power, 2.5 * power, 5 * power, 10 * power, 20 * power):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= most:
            break
    return [step * number for number in range(first, max(last, first + 1) + 1)]


Box = tuple[float, float, float, float]
LETTER, LINE, RADIUS = 6.6, 12.0, 8.0  # of the pictures' text and points, in their own units


def _labels(places: list[tuple[float, float]], names: list[str], picture: Box) -> list[Json | None]:
    """Where names stand: by their points, over no other name or point; None where there is no room."""
    points = [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in places]
    taken: list[Box] = []
    found: list[Json | None] = []
    for (x, y), name, own in zip(places, names, points, strict=True):
        wide = LETTER * len(name)
        others = [*taken, *(one for one in points if one != own)]
        starts = (x + RADIUS + 3, x - RADIUS - 3 - wide, x - wide / 2)
        lines = (0.0, *(side * LINE * line for line in range(1, 4) for side in (1, -1)))
        tries = ((start, y + line) for line in lines for start in starts if line or start != starts[2])
        for start, middle in tries:
            box = (start, middle - LINE / 2, start + wide, middle + LINE / 2)
            if _inside(box, picture) and not any(_meet(box, other) for other in others):
                taken.append(box)
                found.append({"x": start, "y": middle + 4})
                break
        else:
            found.append(None)
    return found


def _inside(box: Box, picture: Box) -> bool:
    return box[0] >= picture[0] and box[1] >= picture[1] and box[2] <= picture[2] and box[3] <= picture[3]


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


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
