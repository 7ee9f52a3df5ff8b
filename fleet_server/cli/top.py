"""`shoal device top` and `shoal top`: a device, or the fleet, live, from what devices have told the server."""

from __future__ import annotations

import datetime as dt
import time
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from fleet_server.cli.fleet_picture import read_fleet
from fleet_server.cli.output import Json, Output, OutputOption, QueryOption, client, fail, print_json, rows_table
from fleet_server.sdk import Client, segment


def top(
    context: typer.Context,
    device_id: Annotated[str, typer.Argument(metavar="ID", help="The device's id.")],
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.2, max=3600.0)] = 2.0,
    window: Annotated[float, typer.Option(help="Sum up so many seconds of telemetry.", min=1.0, max=86_400.0)] = 60.0,
    once: Annotated[bool, typer.Option("--once", help="Print it once, and end.")] = False,  # noqa: FBT002
    output: OutputOption = Output.TABLE,
) -> None:
    """Watch one device: models, latency, throughput, errors, memory, heat.

    From the telemetry that it sends: figures are as old as its last window. With -o json it is printed once.

    Example: shoal device top camera-01 --window 300
    """
    with client(context) as api:
        found = snapshot(api, device_id, window)
        if output is Output.JSON:
            print_json(found)
        elif once or not Console().is_terminal:
            Console().print(picture(found))
        else:
            _watch(api, found, every=every, window=window)


def _watch(api: Client, found: Json, *, every: float, window: float) -> None:
    try:
        with Live(picture(found), auto_refresh=False, screen=True) as live:
            while True:
                time.sleep(every)
                found = snapshot(api, found["device"], window)
                live.update(picture(found), refresh=True)
    except KeyboardInterrupt:
        return


def snapshot(api: Client, device_id: str, window_s: float) -> Json:
    """A device now: how it is itself, and what each version that it serves did in the newest so many seconds."""
    device = api.get(f"/devices/{segment(device_id)}")
    hosts = api.get("/telemetry/hosts", device=device_id, limit=1)["items"]
    did: dict[tuple[str, str], Json] = {}
    if hosts:  # by the device's own clock, which may be another than ours
        last = dt.datetime.fromisoformat(hosts[0]["at"])
        since = last - dt.timedelta(seconds=window_s)
        rows = api.items("/telemetry/models", device=device_id, since=since.isoformat(), by="device")
        did = {(row["model"], row["version"]): row for row in rows}
    return {
        "device": device["id"],
        "profile": device["profile"],
        "online": device["online"],
        "last_seen_at": device["last_seen_at"],
        "window_s": window_s,
        "host": _host(device, hosts[0] if hosts else {}),
        "models": [_model(one, did.get((one["model"], one["version"]), {})) for one in device["serving"]],
        "problems": [one for one in device["problems"] if one["ongoing"]],
    }


def _host(device: Json, window: Json) -> Json:
    names = ("at", "cpu_percent", "memory_used_mb", "agent_rss_mb", "temperature_c", "disk_free_mb")
    return {name: window.get(name) for name in names} | {"memory_mb": device["facts"].get("memory_mb")}


def _model(serving: Json, did: Json) -> Json:
    counts = {name: did.get(name, 0) for name in ("requests", "errors", "rejected")}
    times = ("throughput_per_s", "latency_p50_ms", "latency_p95_ms", "latency_p99_ms")
    return {
        "model": serving["model"],
        "version": serving["version"],
        "provider": serving["provider"],
        **counts,
        **{name: did.get(name) for name in times},
    }


def picture(found: Json) -> RenderableType:
    """A snapshot for people."""
    host = found["host"]
    standing = "online" if found["online"] else f"offline since {str(found['last_seen_at'])[:19].replace('T', ' ')}"
    head = Text.assemble(
        (found["device"], "bold"),
        f"  {found['profile'] or 'no profile'}  ",
        (standing, "" if found["online"] else "red"),
    )
    memory = _of(host["memory_used_mb"], host["memory_mb"])
    told = (
        ("CPU", _unit(host["cpu_percent"], "%")),
        ("memory", memory),
        ("agent", _unit(host["agent_rss_mb"], " MiB")),
        ("temperature", _unit(host["temperature_c"], " °C")),
        ("disk free", _unit(host["disk_free_mb"], " MiB")),
    )
    lines: list[RenderableType] = [head, Text("  ".join(f"{name} {value}" for name, value in told))]
    if host["at"]:
        lines.append(
            Text(f"of the {found['window_s']:g} s before {host['at'][:19].replace('T', ' ')} UTC", style="dim")
        )
    lines.append(rows_table(found["models"], _COLUMNS) if found["models"] else Text("it serves nothing"))
    lines += [Text(f"{one['code']}: {one['detail']}", style="red") for one in found["problems"]]
    return Group(*lines)


def _unit(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{value:.0f}{unit}"


def _of(part: float | None, whole: float | None) -> str:
    return _unit(part, "") + (f" of {whole:.0f} MiB" if whole else " MiB")


_COLUMNS: list[tuple[str, Any]] = [
    ("model", lambda row: f"{row['model']}@{row['version']}"),
    ("runs on", lambda row: row["provider"]),
    ("requests", lambda row: row["requests"]),
    ("/s", lambda row: row["throughput_per_s"]),
    ("errors", lambda row: row["errors"]),
    ("rejected", lambda row: row["rejected"]),
    ("p50 ms", lambda row: row["latency_p50_ms"]),
    ("p95 ms", lambda row: row["latency_p95_ms"]),
    ("p99 ms", lambda row: row["latency_p99_ms"]),
]


def fleet_top(
    context: typer.Context,
    query: QueryOption = None,
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.5, max=3600.0)] = 2.0,
    window: Annotated[float, typer.Option(help="Sum up so many seconds of telemetry.", min=1.0, max=86_400.0)] = 60.0,
) -> None:
    """Watch the fleet in the terminal: devices, versions, rollouts.

    It needs `pip install 'shoal[cli-top]'`. Enter shows a device, t those in trouble alone, r looks now, q ends.

    Example: shoal top --query "site==plant7"
    """
    try:
        from fleet_server.cli.top_app import FleetApp
    except ImportError:
        raise fail("this needs Textual: pip install 'shoal[cli-top]'; `shoal device top` does without") from None
    with client(context) as api:
        read_fleet(api, query=query, window_s=window)  # what is wrong is said before the screen is taken
        app = FleetApp(
            lambda: read_fleet(api, query=query, window_s=window),
            lambda device_id: picture(snapshot(api, device_id, window)),
            every,
        )
        app.run()
