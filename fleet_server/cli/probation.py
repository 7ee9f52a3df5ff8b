"""How `shoal rollout` reads and shows probation: what a device watches a new version by, and what it saw."""

from __future__ import annotations

import re

from fleet_server.cli.output import Json, fail

HELP = (
    'How devices watch the version before they keep it: "time[,name=number…]". Names: at-most (time), requests, errors '
    "(percent), latency (times the version before), memory and growth (MiB); and `replace`, to take the version before "
    "out where memory is short. `provider=refuse`, or `keep_old`: it fails where the execution provider wanted first "
    "can't run it, always or where something serves. "
    'Example: "60s,at-most=15m,requests=50,errors=5,latency=1.5".'
)
_TIME = re.compile(r"^(\d+(?:\.\d+)?)(s|m|h)?$")
ON_PROVIDER_MISSING = ("fall_back", "refuse", "keep_old")
_SECONDS = {"s": 1, "m": 60, "h": 3600}
_NUMBERS = {
    "requests": "minimum_requests",
    "errors": "error_percent",
    "latency": "latency_p95_ratio",
    "memory": "memory_mb",
    "growth": "growth_mb",
}


def parse(text: str) -> Json:
    """The request's `probation`; ends the program with what is wrong and how it is written."""
    found: Json = {}
    for part in (piece.strip() for piece in text.split(",")):
        name, given, value = part.partition("=")
        if part == "replace":
            found["on_memory_short"] = "replace"
        elif name == "provider" and value in ON_PROVIDER_MISSING:
            found["on_provider_missing"] = value
        elif name == "provider":
            raise fail(f"--probation: provider={value} is not one of {', '.join(ON_PROVIDER_MISSING)}", 2)
        elif not given:
            found["seconds"] = _time(part)
        elif name == "at-most":
            found["at_most_s"] = _time(value)
        elif name in _NUMBERS and re.fullmatch(r"\d+(\.\d+)?", value):
            found[_NUMBERS[name]] = float(value) if name != "requests" else int(float(value))
        else:
            names = ", ".join(("at-most", *_NUMBERS, "replace", "provider"))
            raise fail(f"--probation: {part!r} is not one of {names} with a number, such as errors=5", 2)
    return found


def _time(text: str) -> float:
    match = _TIME.match(text)
    if not match:
        raise fail(f"--probation: {text!r} is not a time such as 60s or 15m", 2)
    return float(match[1]) * _SECONDS[match[2] or "s"]


def seen(row: Json) -> str | None:
    """What a device saw of a version, in a few words."""
    found = row["probation"]
    if found is None:
        return None
    parts = [f"{found['requests']} requests"]
    if found["errors"]:
        parts.append(f"{found['errors']} errors")
    if found["rejected"]:
        parts.append(f"{found['rejected']} refused")
    if found["latency_p95_ms"] and found["before_p95_ms"]:
        parts.append(f"p95 ×{found['latency_p95_ms'] / found['before_p95_ms']:.2f}")
    if not found["exercised"]:
        parts.append("not exercised")
    if found["note"]:
        parts.append(found["note"])
    return ", ".join(parts)
