"""`shoal model shard`: a model that is too big for one device, in stages on several."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from fleet_server.cli.output import (
    Json,
    Output,
    OutputOption,
    YesOption,
    client,
    confirm,
    errors,
    print_json,
    show_object,
    show_rows,
)
from fleet_server.sdk import segment

POLL_S = 0.5
MIB = 2**20
PlanArgument = Annotated[str, typer.Argument(metavar="ID", help="The shard plan's id.")]


def shard(
    context: typer.Context,
    reference: Annotated[str, typer.Argument(metavar="MODEL@VERSION", help="The version; it needs an ONNX form.")],
    target: Annotated[str, typer.Option(help="Devices to choose from, as a query (RSQL).")],
    stages: Annotated[int | None, typer.Option(help="How many. Default: the fewest that fit.", min=1, max=8)] = None,
    rows: Annotated[int, typer.Option(help="Of a micro-batch, whose activations are held.", min=1, max=1024)] = 1,
    memory: Annotated[
        float | None, typer.Option(help="MiB a stage may take on a device. Default: a quarter of its memory.")
    ] = None,
    lost_after: Annotated[float, typer.Option(help="Seconds offline until a stage goes to another device.")] = 60.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Cut and compare; keep nothing.")] = False,  # noqa: FBT002
    wait: Annotated[bool, typer.Option(help="Wait until every stage serves.")] = False,  # noqa: FBT002
    output: OutputOption = Output.TABLE,
) -> None:
    """Cut a version into stages, one a device, and roll them out.

    Cuts are chosen by compute, memory and bytes over links. Each stage is a model of its own, NAME.stage-1-of-3.
    Example: shoal model shard detector@3 --target 'site==plant7' --stages 3 --dry-run
    """
    body = {
        "version": reference,
        "target": target,
        "stages": stages,
        "rows": rows,
        "memory_mb": memory,
        "lost_after_s": lost_after,
        "dry_run": dry_run,
    }
    with client(context) as api:
        found = api.post("/shard-plans", body)
        while wait and found["state"] == "deploying":
            errors.print(found["detail"] or "the keeper looks at it soon", highlight=False)
            time.sleep(POLL_S)
            found = api.get(f"/shard-plans/{segment(found['id'])}")
    _show(found, output)
    if found["state"] == "failed":
        raise typer.Exit(1)


def shards(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Only of this model.")] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """List models that are cut into stages, newest first."""
    with client(context) as api:
        show_rows(
            api.items("/shard-plans", model=model),
            output,
            [
                ("id", lambda row: row["id"]),
                ("version", lambda row: f"{row['model']}@{row['version']}"),
                ("state", lambda row: row["state"]),
                ("devices", lambda row: ", ".join(one["device"] for one in row["stages"])),
                ("detail", lambda row: row["detail"]),
            ],
            empty="no model is cut into stages; cut one with `shoal model shard`",
        )


def show_shards(context: typer.Context, plan_id: PlanArgument, output: OutputOption = Output.TABLE) -> None:
    """Show a shard plan: stages, their devices, what it waits for."""
    with client(context) as api:
        _show(api.get(f"/shard-plans/{segment(plan_id)}"), output)


def unshard(context: typer.Context, plan_id: PlanArgument, yes: YesOption = False) -> None:  # noqa: FBT002
    """Delete a shard plan; its stages stay on their devices."""
    confirm(f"delete shard plan {plan_id}?", yes=yes)
    with client(context) as api:
        api.delete(f"/shard-plans/{segment(plan_id)}")


def _show(found: Json, output: Output) -> None:
    if output is Output.JSON:
        print_json(found)
        return
    proof = found["proof"]
    same = "bit for bit, unoptimized" if proof["exact"] else "not bit for bit"
    show_object(
        {
            "id": found["id"],
            "version": f"{found['model']}@{found['version']}",
            "state": found["state"],
            "detail": found["detail"] or None,
            "slowest stage": f"{found['slowest_s'] * 1e3:.3g} ms a row",
            "whole, on the server": f"{proof['whole_s'] * 1e3:.3g} ms a row",
            "differs by": f"{proof['difference']:.3g} ({same})",
            "sent": "integers of one byte" if proof["quantized"] else "as the net computes",
        },
        output,
    )
    show_rows(found["stages"], output, COLUMNS, empty="")


COLUMNS = [
    ("stage", lambda row: f"{row['model']}@{row['version']}"),
    ("device", lambda row: row["device"]),
    ("ms a row", lambda row: float(f"{row['compute_s'] * 1e3:.3g}")),
    ("link ms", lambda row: float(f"{row['transfer_s'] * 1e3:.3g}")),
    ("MiB", lambda row: float(f"{(row['weight_bytes'] + row['activation_bytes']) / MIB:.3g}")),
    ("of MiB", lambda row: float(f"{row['memory_limit'] / MIB:.4g}")),
    ("bytes in", lambda row: row["bytes_in"]),
    ("bytes out", lambda row: row["bytes_out"]),
    ("serves", lambda row: "yes" if row["serves"] else "no"),
]
