"""`shoal device`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fleet_server.cli import commands, identities
from fleet_server.cli.output import (
    IfMatchOption,
    Output,
    OutputOption,
    QueryOption,
    YesOption,
    client,
    confirm,
    show_object,
    show_rows,
    waits,
)
from fleet_server.cli.profiles import pairs
from fleet_server.cli.top import top
from fleet_server.sdk import segment

device = typer.Typer(no_args_is_help=True, help="Devices: what they are, and what runs on them.")
device.add_typer(identities.token, name="token")
for name, command in (
    ("pending", identities.pending),
    ("approve", identities.approve),
    ("reject", identities.reject),
    ("register", identities.register),
    ("identity", identities.identity),
    ("revoke", identities.revoke),
    ("ca", identities.authority),
    ("restart-runtime", commands.restart_runtime),
    ("benchmark", commands.benchmark),
    ("measure", commands.measure),
    ("identify", commands.identify),
    ("logs", commands.logs),
    ("top", top),
):
    device.command(name)(command)


@device.command("list")
def list_devices(
    context: typer.Context,
    profile_name: Annotated[str | None, typer.Option("--profile", help="Only devices of this profile.")] = None,
    online: Annotated[
        bool | None, typer.Option("--online/--offline", help="Only connected ones, or the others.")
    ] = None,
    query: QueryOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """List devices with their profile and what they serve.

    Example: shoal device list --query "site==plant7;accelerator==cuda"
    """
    with client(context) as api:
        show_rows(
            api.items("/devices", profile=profile_name, online=online, query=query),
            output,
            [
                ("device", lambda row: row["id"]),
                ("profile", lambda row: row["profile"]),
                ("online", lambda row: row["online"]),
                ("serves", lambda row: ", ".join(f"{one['model']}@{one['version']}" for one in row["serving"]) or None),
                ("runs on", lambda row: ", ".join(sorted({_runs_on(one) for one in row["serving"]})) or None),
                ("arch", lambda row: row["facts"].get("arch")),
                ("link", lambda row: row["facts"].get("link", {}).get("type")),
                ("waits", lambda row: "; ".join(waits(one["waiting"]) for one in row["waiting"]) or None),
            ],
            empty="no device has connected yet; start one with `shoal-agent run` or `shoal up`",
        )


@device.command("show")
def show_device(
    context: typer.Context,
    device_id: Annotated[str, typer.Argument(help="Its id.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Show one device: facts, tags, profile, and what truly answers requests."""
    with client(context) as api:
        found, etag = api.get_tagged(f"/devices/{segment(device_id)}")
        found["etag"] = etag
        identity = api.get(f"/devices/{segment(device_id)}/identity")
        found = {**found, "locked_out_at": identity["revoked_at"], "out_of_order": identity["conduct"]}
        if output is Output.TABLE:
            shown = {k: v for k, v in found.items() if k != "facts"}
            shown["problems"] = "\n".join(map(_problem, found["problems"])) or None
            found = {**shown, **found["facts"], "agent": _agent(found["facts"])}
        show_object(found, output)


def _agent(facts: dict[str, Any]) -> str:
    """Which agent runs there, where it came from, and whether it may become another one by itself."""
    told = facts.get("agent") or {}
    source = f"release {told['release'][:16]}" if told.get("release") else "installed"
    update = {"on": "", "": ""}.get(told.get("self_update", ""), f", self_update {told.get('self_update')}")
    return f"{facts.get('agent_version', '?')} ({source}{update})"


def _runs_on(one: dict[str, Any]) -> str:
    return f"{one['provider']} (fell back)" if one["fell_back"] else str(one["provider"])


def _problem(one: dict[str, Any]) -> str:
    """One problem as a line: when it was last seen, how often, and what it is."""
    when = "now" if one["ongoing"] else one["last_at"][:16].replace("T", " ")
    often = f" ({one['count']} times)" if one["count"] > 1 else ""
    return f"{when} {one['code']}{often}: {one['detail']}"


@device.command("pin")
def pin_device(
    context: typer.Context,
    device_id: Annotated[str, typer.Argument(help="Its id.")],
    profile_name: Annotated[str | None, typer.Argument(help="The profile; leave it out to let it match again.")] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Pin a device to a profile, whatever its facts say.

    Example: shoal device pin camera-01 rpi5-litert
    """
    with client(context) as api:
        show_object(api.patch(f"/devices/{segment(device_id)}", {"profile": profile_name}), output)


@device.command("tag")
def tag_device(
    context: typer.Context,
    device_id: Annotated[str, typer.Argument(help="Its id.")],
    tags: Annotated[list[str], typer.Argument(help="key=value pairs; they replace those given before.")],
    if_match: IfMatchOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Give a device tags, for profiles and rollouts to match.

    Example: shoal device tag camera-01 site=plant7 line=3
    """
    with client(context) as api:
        change = {"tags": pairs(tags, "tags")}
        show_object(api.patch(f"/devices/{segment(device_id)}", change, if_match=if_match), output)


@device.command("forget")
def forget_device(
    context: typer.Context,
    device_id: Annotated[str, typer.Argument(metavar="ID", help="The device's id.")],
    yes: YesOption = False,  # noqa: FBT002
) -> None:
    """Hide a device that is offline for good, and end its part in every rollout.

    Its history stays. When its agent connects again, it is back with its tags.
    """
    confirm(f"forget device {device_id}?", yes=yes)
    with client(context) as api:
        api.delete(f"/devices/{segment(device_id)}")


@device.command("hold")
def hold(
    context: typer.Context,
    device_id: Annotated[str, typer.Argument(help="Its id.")],
    reason: Annotated[str, typer.Option("-r", "--reason", help="Why; shown wherever something waits for it.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Hold a device back: no rollout sends it anything until it is released.

    What it runs goes on.

    Example: shoal device hold cam-7 --reason "under repair until Friday"
    """
    with client(context) as api:
        found = api.post(f"/devices/{segment(device_id)}/hold", {"reason": reason})
        show_object(found if output is Output.JSON else {"id": found["id"], "held": found["hold"]["reason"]}, output)


@device.command("pin")
def pin(
    context: typer.Context,
    device_id: Annotated[str, typer.Argument(help="Its id.")],
    version: Annotated[str, typer.Argument(metavar="MODEL@VERSION", help="The version it is to run.")],
    reason: Annotated[str, typer.Option("-r", "--reason", help="Why; shown wherever something waits for it.")],
    allow_unproven: Annotated[bool, typer.Option(help="Also a variant that no device has measured.")] = False,  # noqa: FBT002
    output: OutputOption = Output.TABLE,
) -> None:
    """Pin a device to a version: send it, and hold the device there.

    Example: shoal device pin cam-7 mnist@2 --reason "compared with the old scale until May"
    """
    body = {"version": version, "reason": reason, "allow_unproven": allow_unproven}
    with client(context) as api:
        found = api.post(f"/devices/{segment(device_id)}/pin", body)
        show_object(found if output is Output.JSON else {"id": device_id, "rollout": found["id"]}, output)


@device.command("release")
def release(
    context: typer.Context,
    device_id: Annotated[str, typer.Argument(help="Its id.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Let rollouts send a device something again."""
    with client(context) as api:
        found = api.post(f"/devices/{segment(device_id)}/release")
        show_object(found if output is Output.JSON else {"id": found["id"], "held": None}, output)
