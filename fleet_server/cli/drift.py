"""`shoal model drift` and `shoal telemetry drift`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from fleet_server.cli.output import (
    Json,
    Output,
    OutputOption,
    QueryOption,
    client,
    errors,
    fail,
    print_json,
    rows_table,
    show_rows,
)
from fleet_server.sdk import segment

SAID = {
    "kept": "what was kept when alert rules first looked",
    "first_windows": "the first telemetry that there is",
    "none": "none yet",
}


def version_drift(
    context: typer.Context,
    reference: Annotated[str, typer.Argument(metavar="MODEL@VERSION", help="The version.")],
    device: Annotated[str | None, typer.Option(help="Only this device.")] = None,
    query: QueryOption = None,
    since: Annotated[str | None, typer.Option(help="A time, in UTC without a zone. Default: an hour ago.")] = None,
    until: Annotated[str | None, typer.Option(help="A time. Default: now.")] = None,
    bins: Annotated[bool, typer.Option("--bins", help="With the histograms.")] = False,  # noqa: FBT002
    output: OutputOption = Output.TABLE,
) -> None:
    """How a version's inputs and answers have moved since it began.

    It is compared with what the same version was like on the same devices when alert rules first looked at it; where
    nothing is kept, with its first telemetry. Figures are those of alert rules and stop rules, over all these devices.

    Example: shoal model drift mnist@2 --query site==plant7 --bins
    """
    model, _, version = reference.partition("@")
    if not (model and version):
        raise fail(f"{reference!r} is no MODEL@VERSION", 2)
    with client(context) as api:
        path = f"/models/{segment(model)}/versions/{segment(version)}/drift"
        found = api.get(path, device=device, query=query, since=since, until=until)
    if output is Output.JSON:
        print_json(found)
        return
    _show(found, bins=bins)


def list_drift(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Only this model.")] = None,
    version: Annotated[str | None, typer.Option(help="Only this version.")] = None,
    device: Annotated[str | None, typer.Option(help="Only this device.")] = None,
    query: QueryOption = None,
    limit: Annotated[int, typer.Option(help="How many rows.", min=1, max=500)] = 20,
    output: OutputOption = Output.TABLE,
) -> None:
    """How far models on devices have moved, the worst first.

    As alert rules for drift found when they last looked, which is every ten minutes. A * marks what is beyond the
    threshold of a rule.
    """
    with client(context) as api:
        rows = api.get("/drift", model=model, version=version, device=device, query=query, limit=limit)["items"]
    show_rows(
        rows,
        output,
        [
            ("device", lambda row: row["device_id"]),
            ("version", lambda row: f"{row['model']}@{row['version']}"),
            ("moved", lambda row: f"{row['worst']:.3g}{' *' if row['over'] else ''}"),
            ("inputs PSI", lambda row: row["input_drift"]),
            ("answers PSI", lambda row: row["output_drift"]),
            ("confidences KS", lambda row: row["confidence_shift"]),
            ("requests", lambda row: row["requests"]),
            ("at (UTC)", lambda row: _minute(row["at"])),
        ],
        empty="no alert rule has looked at drift yet: the shipped one is called drift (shoal alert rule ls)",
    )


def _show(found: Json, *, bins: bool) -> None:
    console = Console(highlight=False)
    for name, side, said in (
        ("now", found["now"], f"{_minute(found['now']['since'])} to {_minute(found['now']['until'])} UTC"),
        ("reference", found["reference"], SAID[found["reference"]["source"]]),
    ):
        console.print(f"{name}: {side['requests']} requests, {side['devices']} devices ({said})")
    console.print(
        rows_table(
            found["figures"],
            [
                ("figure", lambda row: row["metric"]),
                ("measure", lambda row: row["measure"].upper()),
                ("value", lambda row: row["value"]),
                ("alert above", lambda row: row["threshold"]),
                ("rule", lambda row: row["rule"]),
            ],
        )
    )
    if not found["distributions"]:
        errors.print("these devices said nothing of inputs and answers in this time")
        return
    console.print(
        rows_table(
            found["distributions"],
            [
                ("of", _title),
                ("measure", lambda row: row["measure"].upper()),
                ("distance", lambda row: row["distance"]),
                ("rows before", lambda row: row["reference_rows"]),
                ("rows now", lambda row: row["now_rows"]),
            ],
        )
    )
    for one in found["distributions"] if bins else ():
        console.print(
            rows_table(
                one["bins"],
                [
                    (_title(one), lambda row: row["label"]),
                    ("reference", lambda row: _percent(row["reference"])),
                    ("now", lambda row: _percent(row["now"])),
                ],
            )
        )


def _minute(time: str) -> str:
    return time[:16].replace("T", " ")


def _title(distribution: Json) -> str:
    """What a distribution is of."""
    if distribution["tensor"] is None:
        return str(distribution["kind"])
    return f"{distribution['kind']} {distribution['tensor']}: {distribution['part']}"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f} %"
