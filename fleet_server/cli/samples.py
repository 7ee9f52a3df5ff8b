"""`shoal sample`: rows that models were least sure of, kept on devices and sent when somebody asks."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from fleet_server.cli.output import (
    Json,
    Output,
    OutputOption,
    QueryOption,
    YesOption,
    client,
    confirm,
    fail,
    print_json,
    show_object,
    show_rows,
    waits,
)
from fleet_server.sdk import Client, segment

sample = typer.Typer(no_args_is_help=True, help="Samples: rows a model was least sure of, kept on devices.")
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="The model's name.")]
ProfileOption = Annotated[str, typer.Option(help="Devices of this profile.")]
RequestArgument = Annotated[str, typer.Argument(metavar="ID", help="The request's id.")]
SetArgument = Annotated[str, typer.Argument(metavar="ID", help="The set's id, as `list` shows it.")]
POLL_S = 0.5


@sample.command("keep")
def keep(
    context: typer.Context,
    model: ModelArgument,
    profile: ProfileOption,
    samples: Annotated[int, typer.Option(help="How many rows at most.")] = 100,
    megabytes: Annotated[float, typer.Option(help="Of all of them together, in MiB.")] = 16.0,
    sample_megabytes: Annotated[float, typer.Option(help="A row that takes more, in MiB, is not kept.")] = 1.0,
    days: Annotated[float, typer.Option(help="How long one is kept.")] = 7.0,
    below: Annotated[float, typer.Option(help="Only rows whose confidence is below, 0 to 1.")] = 0.6,
    output: OutputOption = Output.TABLE,
) -> None:
    """Let devices keep samples of a model, where their owners allow it.

    Off unless this turns it on, for an admin alone, and the device's own configuration has samples.allow = true.

    Example: shoal sample keep mnist --profile rpi5-onnx --samples 200 --below 0.5
    """
    body = {
        "samples": samples,
        "megabytes": megabytes,
        "sample_megabytes": sample_megabytes,
        "days": days,
        "below": below,
    }
    with client(context) as api:
        found = api.put(f"/models/{segment(model)}/sampling-rules/{segment(profile)}", body)
        show_object(found, output)


@sample.command("stop")
def stop(context: typer.Context, model: ModelArgument, profile: ProfileOption) -> None:
    """Let devices keep no samples of a model; they delete what they have."""
    with client(context) as api:
        api.delete(f"/models/{segment(model)}/sampling-rules/{segment(profile)}")


@sample.command("rules")
def rules(context: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """List of which models samples are kept, and where."""
    with client(context) as api:
        show_rows(
            api.items("/sampling-rules"),
            output,
            [
                ("model", lambda row: row["model"]),
                ("profile", lambda row: row["profile"]),
                ("samples", lambda row: row["spec"]["samples"]),
                ("MiB", lambda row: row["spec"]["megabytes"]),
                ("days", lambda row: row["spec"]["days"]),
                ("below", lambda row: row["spec"]["below"]),
                ("by", lambda row: row["created_by"]),
            ],
            empty="no samples are kept anywhere; turn it on with `shoal sample keep`",
        )


@sample.command("request")
def request(
    context: typer.Context,
    model: ModelArgument,
    device: Annotated[list[str], typer.Option(help="This device; repeat.")] = [],  # noqa: B006
    query: QueryOption = None,
    samples: Annotated[int, typer.Option(help="Of each device, the least sure ones first.")] = 100,
    megabytes: Annotated[float, typer.Option(help="Of each device's file at most, in MiB.")] = 16.0,
    timeout: Annotated[float, typer.Option(help="Seconds after which what has not come counts as failed.")] = 86_400.0,
    wait: Annotated[bool, typer.Option(help="Wait until each device has answered.")] = False,  # noqa: FBT002
    output: OutputOption = Output.TABLE,
) -> None:
    """Ask devices for the samples that they keep of a model.

    They send within their links' budgets, and forget what has come. With --wait exit code 1 where a device failed.

    Example: shoal sample request mnist --query "site==plant7" --samples 50 --wait
    """
    body = {
        "model": model,
        "devices": device,
        "query": query,
        "samples": samples,
        "megabytes": megabytes,
        "timeout_s": timeout,
    }
    with client(context) as api:
        found = api.post("/sample-requests", body)
        while wait and found["state"] == "running":
            time.sleep(POLL_S)
            found = api.get(f"/sample-requests/{segment(found['id'])}")
        _show(found, output)
        if wait and any(one["state"] == "failed" for one in found["uploads"]):
            raise typer.Exit(1)


@sample.command("requests")
def requests(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Only of this model.")] = None,
    state: Annotated[str | None, typer.Option(help="running, done or cancelled.")] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """List requests for samples, newest first."""
    with client(context) as api:
        show_rows(
            api.items("/sample-requests", model=model, state=state),
            output,
            [
                ("id", lambda row: row["id"]),
                ("model", lambda row: row["model"]),
                ("state", lambda row: row["state"]),
                ("devices", lambda row: len(row["uploads"])),
                ("samples", lambda row: sum(one["samples"] for one in row["uploads"] if one["state"] == "stored")),
                ("by", lambda row: row["created_by"]),
            ],
            empty="nobody has asked for samples yet; ask with `shoal sample request`",
        )


@sample.command("show")
def show(context: typer.Context, request_id: RequestArgument, output: OutputOption = Output.TABLE) -> None:
    """Show what came of each device of a request, or why nothing did."""
    with client(context) as api:
        _show(api.get(f"/sample-requests/{segment(request_id)}"), output)


@sample.command("cancel")
def cancel(context: typer.Context, request_id: RequestArgument, output: OutputOption = Output.TABLE) -> None:
    """End a request; what has come stays."""
    with client(context) as api:
        _show(api.post(f"/sample-requests/{segment(request_id)}/cancel"), output)


@sample.command("list")
def list_sets(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Only of this model.")] = None,
    device: Annotated[str | None, typer.Option(help="Only of this device.")] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """List samples that have come, newest first."""
    with client(context) as api:
        show_rows(
            api.items("/sample-sets", model=model, device=device),
            output,
            [
                ("id", lambda row: row["id"]),
                ("model", lambda row: row["model"]),
                ("device", lambda row: row["device_id"]),
                ("samples", lambda row: row["samples"]),
                ("KiB", lambda row: round(row["size"] / 1024, 1)),
                ("kept until", lambda row: row["kept_until"][:16].replace("T", " ")),
            ],
            empty="no samples have come yet; ask for them with `shoal sample request`",
        )


@sample.command("download")
def download(
    context: typer.Context,
    set_id: SetArgument,
    to: Annotated[Path, typer.Option(help="Folder for ID.npz and ID.json.")] = Path(),
    output: OutputOption = Output.TABLE,
) -> None:
    """Download samples: the arrays as ID.npz, what they are as ID.json.

    Example: shoal sample download 0190c0de-0000-7000-8000-000000000000 --to samples
    """
    with client(context) as api:
        found = api.get(f"/sample-sets/{segment(set_id)}")
        target = to / f"{found['id']}.npz"
        part = target.with_suffix(".part")
        try:
            to.mkdir(parents=True, exist_ok=True)
            _fetch(api, found, part)
            target.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
            part.replace(target)
        except OSError as error:
            raise fail(f"{error.filename or to} can't be written: {error.strerror}") from None
        finally:
            part.unlink(missing_ok=True)
        files = {"arrays": str(target), "listing": str(target.with_suffix(".json"))}
        show_object({**files, "samples": found["samples"], "digest": found["digest"]}, output)


@sample.command("delete")
def delete(context: typer.Context, set_id: SetArgument, yes: YesOption = False) -> None:  # noqa: FBT002
    """Delete samples that have come."""
    with client(context) as api:
        confirm(f"Delete the samples {set_id}?", yes=yes)
        api.delete(f"/sample-sets/{segment(set_id)}")


def _fetch(api: Client, found: Json, path: Path) -> None:
    with path.open("wb") as file:
        api.download(f"/sample-sets/{segment(found['id'])}/content", file.write)


def _show(found: Json, output: Output) -> None:
    if output is Output.JSON:
        print_json(found)
        return
    fields = ("id", "model", "state", "samples", "megabytes", "created_by", "deadline_at")
    show_object({name: found[name] for name in fields}, output)
    show_rows(
        found["uploads"],
        output,
        [
            ("device", lambda row: row["device_id"]),
            ("state", lambda row: row["state"]),
            ("samples", lambda row: row["samples"]),
            ("bytes", lambda row: f"{row['received']} of {row['size']}" if row["size"] else None),
            ("set", lambda row: row["id"] if row["state"] == "stored" else None),
            ("why", lambda row: waits(row["waiting"]) if row["waiting"] else row["detail"] or None),
        ],
        empty="",
    )
