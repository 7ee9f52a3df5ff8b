"""`shoal gate`: candidates measured on devices."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.progress import BarColumn, Progress, TextColumn

from fleet_server.cli.output import (
    WHOLE_WIDTH,
    Json,
    Output,
    OutputOption,
    client,
    errors,
    print_json,
    rows_table,
    show_fitting,
    show_object,
    show_rows,
)
from fleet_server.sdk import Client, segment

gate = typer.Typer(no_args_is_help=True, help="Gate runs: measure a variant on devices of its profile, and judge it.")
RunArgument = Annotated[str, typer.Argument(metavar="ID", help="The gate run's id.")]
POLL_S = 0.3
SETTLED = frozenset({"done", "failed"})


@gate.command("run")
def run(
    context: typer.Context,
    reference: Annotated[str, typer.Argument(metavar="MODEL@VERSION", help="The version, built for the profile.")],
    profile: Annotated[str, typer.Option(help="The profile whose variant is measured.")],
    device: Annotated[list[str], typer.Option(help="On this device; repeat. Default: one that is online.")] = [],  # noqa: B006
    count: Annotated[int, typer.Option(help="How many devices, where none is named.", min=1, max=100)] = 1,
    timeout: Annotated[float, typer.Option(help="Seconds after which it counts as failed.")] = 1800.0,
    wait: Annotated[bool, typer.Option(help="Wait for the verdict.")] = True,  # noqa: FBT002
    output: OutputOption = Output.TABLE,
) -> None:
    """Measure candidates on devices, pick the best there, and judge it.

    Refused is what is slower than fp32, over a budget, or fell back to the CPU. Exit code 1 unless it passed.

    Example: shoal gate run mnist@2 --profile raspberry-pi-5 --device camera-01
    """
    body = {"version": reference, "profile": profile, "devices": device, "count": count, "timeout_s": timeout}
    with client(context) as api:
        found = api.post("/gate-runs", body)
        if wait:
            found = _follow(api, found)
        _show(found, output)
        if wait and found["state"] != "passed":
            raise typer.Exit(1)


@gate.command("list")
def list_runs(
    context: typer.Context,
    version: Annotated[str | None, typer.Option(metavar="MODEL@VERSION", help="Only of this version.")] = None,
    state: Annotated[str | None, typer.Option(help="running, passed, refused, failed or cancelled.")] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """List gate runs, newest first."""
    with client(context) as api:
        show_rows(
            api.items("/gate-runs", version=version, state=state),
            output,
            [
                ("id", lambda row: row["id"]),
                ("version", lambda row: f"{row['model']}@{row['version']}"),
                ("profile", lambda row: row["profile"]),
                ("state", lambda row: row["state"]),
                ("devices", lambda row: ", ".join(one["device_id"] for one in row["trials"])),
            ],
            empty="there is no gate run yet; start one with `shoal gate run`",
        )


@gate.command("show")
def show(context: typer.Context, run_id: RunArgument, output: OutputOption = Output.TABLE) -> None:
    """Show what each device measured of each candidate, and the verdict."""
    with client(context) as api:
        _show(api.get(f"/gate-runs/{segment(run_id)}"), output)


@gate.command("cancel")
def cancel(context: typer.Context, run_id: RunArgument, output: OutputOption = Output.TABLE) -> None:
    """End a gate run; the variant stays as it was."""
    with client(context) as api:
        _show(api.post(f"/gate-runs/{segment(run_id)}/cancel"), output)


def _follow(api: Client, found: Json) -> Json:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[phase]}"))
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        tasks = {
            one["device_id"]: progress.add_task(one["device_id"], total=found["candidates"], phase="")
            for one in found["trials"]
        }
        while found["state"] == "running":
            time.sleep(POLL_S)
            found = api.get(f"/gate-runs/{segment(found['id'])}")
            for one in found["trials"]:
                progress.update(tasks[one["device_id"]], completed=len(one["results"]), phase=one["phase"])
    return found


def _show(found: Json, output: Output) -> None:
    if output is Output.JSON:
        print_json(found)
        return
    checks = (found["verdict"] or {"checks": []})["checks"]
    said = [f"{'holds ' if check['holds'] else 'MISSED'} {check['name']}: {check['detail']}" for check in checks]
    show_object(
        {
            "id": found["id"],
            "variant": f"{found['model']}@{found['version']} for {found['profile']}",
            "state": found["state"],
            "devices": ", ".join(f"{one['device_id']} {one['phase']}" for one in found["trials"]),
            "checks": "\n".join(said) or None,
            "detail": found["detail"] or None,
        },
        output,
    )
    rows = [{"device": one["device_id"], **result} for one in found["trials"] for result in one["results"]]
    if rows:
        show_fitting(lambda width: measurements(rows, width))


def measurements(rows: list[Json], width: int) -> RenderableType:
    """What was measured, for a terminal of so many characters: where it is narrow, latencies stand below the rest."""
    if width >= WHOLE_WIDTH:
        return rows_table(rows, COLUMNS)
    names = COLUMNS[:2] if len({row["device"] for row in rows}) > 1 else COLUMNS[:1]
    return Group(rows_table(rows, [*names, *COLUMNS[2:4], *COLUMNS[7:]]), "", rows_table(rows, [*names, *COLUMNS[4:7]]))


def _measured(name: str, digits: int = 4, scale: float = 1.0):  # type: ignore[no-untyped-def]  # noqa: ANN202 (a column)
    def value(row: Json) -> object:
        found = row[name]
        return None if found is None or row["failure"] else float(f"{found * scale:.{digits}g}")

    return value


COLUMNS = [
    ("recipe", lambda row: row["recipe"]),
    ("device", lambda row: row["device"]),
    ("ran on", lambda row: row["failure"]["detail"] if row["failure"] else row["provider"]),
    ("acc. %", _measured("accuracy", scale=100)),
    ("p50 ms", _measured("latency_p50_ms")),
    ("p95 ms", _measured("latency_p95_ms")),
    ("p99 ms", _measured("latency_p99_ms")),
    ("MiB", _measured("peak_memory_mb", 3)),
    ("load s", _measured("load_s", 3)),
]
