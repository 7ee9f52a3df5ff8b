"""`shoal telemetry`."""

from __future__ import annotations

from typing import Annotated

import typer

from fleet_server.cli.drift import list_drift
from fleet_server.cli.output import Output, OutputOption, QueryOption, client, fail, print_json, show_rows
from fleet_server.sdk import segment

telemetry = typer.Typer(
    no_args_is_help=True, help="Telemetry: what models and devices did, as the devices measured it."
)
telemetry.command("drift")(list_drift)


@telemetry.command("models")
def model_telemetry(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Only this model.")] = None,
    version: Annotated[str | None, typer.Option(help="Only this version.")] = None,
    device: Annotated[str | None, typer.Option(help="Only this device.")] = None,
    by: Annotated[str, typer.Option(help="A row for each device, or version.")] = "device",
    output: OutputOption = Output.TABLE,
) -> None:
    """What versions did on devices: requests, errors, latency, accuracy.

    Accuracy and F1 are there where programs sent labels to the device's feedback endpoint.
    """
    with client(context) as api:
        show_rows(
            api.items("/telemetry/models", model=model, version=version, device=device, by=by),
            output,
            [
                ("device", lambda row: row["device_id"]),
                ("version", lambda row: f"{row['model']}@{row['version']}"),
                ("requests", lambda row: row["requests"]),
                ("errors", lambda row: row["errors"]),
                ("p50 ms", lambda row: row["latency_p50_ms"]),
                ("p95 ms", lambda row: row["latency_p95_ms"]),
                ("accuracy", lambda row: row["accuracy"]),
                ("F1", lambda row: row["macro_f1"]),
            ],
            empty="no device has reported a request yet",
        )


@telemetry.command("hosts")
def host_telemetry(
    context: typer.Context,
    device: Annotated[str | None, typer.Option(help="Only this device.")] = None,
    limit: Annotated[int, typer.Option(help="How many rows.", min=1, max=500)] = 20,
    output: OutputOption = Output.TABLE,
) -> None:
    """How devices themselves were, newest first."""
    with client(context) as api:
        show_rows(
            api.get("/telemetry/hosts", device=device, limit=limit)["items"],
            output,
            [
                ("device", lambda row: row["device_id"]),
                ("at", lambda row: row["at"][:19]),
                ("CPU %", lambda row: row["cpu_percent"]),
                ("agent MiB", lambda row: row["agent_rss_mb"]),
                ("°C", lambda row: row["temperature_c"]),
                ("disk free MiB", lambda row: row["disk_free_mb"]),
            ],
            empty="no device has reported yet",
        )


@telemetry.command("series")
def telemetry_series(
    context: typer.Context,
    reference: Annotated[str, typer.Argument(metavar="MODEL@VERSION", help="The version.")],
    step: Annotated[str, typer.Option(help="10s to 1h, whole hours up to 1d, or whole days.")] = "1h",
    since: Annotated[str | None, typer.Option(help="A time, in UTC without a zone. Default: 24 steps ago.")] = None,
    until: Annotated[str | None, typer.Option(help="A time. Default: now.")] = None,
    device: Annotated[str | None, typer.Option(help="Only this device.")] = None,
    query: QueryOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """What a version did over time: requests, errors, latency, accuracy.

    In equal steps. Percentiles are of all requests of all devices in a step. Accuracy is there where programs sent
    labels to the devices' feedback endpoint.

    Example: shoal telemetry series mnist@2 --step 5m --query site==plant7
    """
    model, _, version = reference.partition("@")
    if not (model and version):
        raise fail(f"{reference!r} is no MODEL@VERSION", 2)
    with client(context) as api:
        found = api.get(
            f"/models/{segment(model)}/versions/{segment(version)}/telemetry",
            step=step, since=since, until=until, device=device, query=query,
        )  # fmt: skip
    if output is Output.JSON:
        print_json(found)
        return
    show_rows(
        found["points"],
        output,
        [
            ("from (UTC)", lambda row: row["at"][:16].replace("T", " ")),
            ("devices", lambda row: row["devices"]),
            ("requests", lambda row: row["requests"]),
            ("errors", lambda row: row["errors"]),
            ("p50 ms", lambda row: row["latency_p50_ms"]),
            ("p95 ms", lambda row: row["latency_p95_ms"]),
            ("p99 ms", lambda row: row["latency_p99_ms"]),
            ("accuracy", lambda row: row["accuracy"]),
        ],
        empty=f"no device reported a request in that time ({found['since'][:16]} to {found['until'][:16]} UTC)",
    )
