"""How pages are written: templates, and the words and numbers in them."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import jinja2
from fastapi import Request
from fastapi.responses import HTMLResponse

from agent.protocol.release import AGENT
from fleet_server.clock import utc_now
from fleet_server.web.api import segment

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)
NOTHING = 1e-12  # less is what rounding left of zero
BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
_SPANS = ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min"), (1.0, "s"))


def ago(value: str | None) -> str:
    """How long ago a time of the API was."""
    if not value:
        return "never"
    seconds = (utc_now() - dt.datetime.fromisoformat(value)).total_seconds()
    if 0 <= seconds < 2:
        return "now"
    unit, name = next(((unit, name) for unit, name in _SPANS if abs(seconds) >= unit), (1.0, "s"))
    whole = f"{abs(seconds) // unit:.0f} {name}"
    return f"{whole} ago" if seconds > 0 else f"in {whole}"


def span(seconds: float | None) -> str:
    """A duration in its largest unit."""
    if seconds is None:
        return "–"
    unit, name = next(((unit, name) for unit, name in _SPANS if seconds >= unit), (1.0, "s"))
    return f"{seconds / unit:.0f} {name}" if seconds >= 10 * unit else f"{seconds / unit:.3g} {name}"


def moment(value: str | None) -> str:
    """A time of the API to the second, in UTC."""
    return dt.datetime.fromisoformat(value).strftime("%Y-%m-%d %H:%M:%S") if value else "–"


def unix_moment(value: float) -> str:
    """Unix seconds, such as a device's clock says, to the second, in UTC; a dash for what no calendar has."""
    try:
        return dt.datetime.fromtimestamp(value, dt.UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, OSError, ValueError):
        return "–"


def number(value: float | None, digits: int = 3, unit: str = "") -> str:
    """A number with so many digits that count; a dash for none."""
    if value is None:
        return "–"
    if abs(value) < NOTHING:
        value = 0
    text = f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 10**digits else f"{value:.{digits}g}"
    return f"{text} {unit}".rstrip()


def size(value: float | None) -> str:
    """Bytes."""
    if value is None:
        return "–"
    power = 0
    while value >= 1024 and power < len(BINARY) - 1:
        value, power = value / 1024, power + 1
    return f"{value:.3g} {BINARY[power]}" if power else f"{value:.0f} B"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def words(value: object) -> str:
    """A name of the API as words."""
    return str(value).replace("_", " ").replace("-", " ")


def pretty(value: Any) -> str:
    """A value as JSON that a person can read."""
    return json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True)


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.globals["AGENT"] = AGENT  # in the place of a model's name, of releases of the agent
ENVIRONMENT.filters |= {
    "ago": ago,
    "span": span,
    "moment": moment,
    "unix_moment": unix_moment,
    "number": number,
    "size": size,
    "percent": percent,
    "words": words,
    "pretty": pretty,
    "segment": segment,
}


def render(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """A page, or a part of one.

    Args:
        request: that it answers.
        template: its file.
        status: of HTTP.
        values: that the template names.
    """
    known = {"path": request.url.path, "query": request.url.query, "signed_in": "authorization" in request.headers}
    text = ENVIRONMENT.get_template(template).render(known | values)
    return HTMLResponse(text, status, {"Content-Security-Policy": POLICY, "Cache-Control": "no-store"})
