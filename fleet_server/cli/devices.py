"""`shoal device` and `shoal profile`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fleet_server.cli.output import Output, OutputOption, YesOption, client, confirm, fail, show_object, show_rows

device = typer.Typer(no_args_is_help=True, help="Devices: what they are, and what runs on them.")
profile = typer.Typer(no_args_is_help=True, help="Profiles: kinds of device, by a match over their facts.")
NameArgument = Annotated[str, typer.Argument(help="Its name.")]


@device.command("list")
def list_devices(
    context: typer.Context,
    profile_name: Annotated[str | None, typer.Option("--profile", help="Only devices of this profile.")] = None,
    online: Annotated[
        bool | None, typer.Option("--online/--offline", help="Only connected ones, or the others.")
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """List devices with their profile and what they serve."""
    with client(context) as api:
        show_rows(
            api.items("/devices", profile=profile_name, online=online),
            output,
            [
                ("device", lambda row: row["id"]),
                ("profile", lambda row: row["profile"]),
                ("online", lambda row: row["online"]),
                ("serves", lambda row: ", ".join(f"{one['model']}@{one['version']}" for one in row["serving"]) or None),
                ("runs on", lambda row: ", ".join(sorted({one["provider"] for one in row["serving"]})) or None),
                ("arch", lambda row: row["facts"].get("arch")),
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
        found = api.get(f"/devices/{device_id}")
        if output is Output.TABLE:
            found = {**{k: v for k, v in found.items() if k != "facts"}, **found["facts"]}
        show_object(found, output)


@device.command("pin")
def pin_device(
    context: typer.Context,
    device_id: Annotated[str, typer.Argument(help="Its id.")],
    profile_name: Annotated[str | None, typer.Argument(help="The profile; leave it out to let it match again.")] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Pin a device to a profile, whatever its facts say."""
    with client(context) as api:
        show_object(api.patch(f"/devices/{device_id}", {"profile": profile_name}), output)


@device.command("tag")
def tag_device(
    context: typer.Context,
    device_id: Annotated[str, typer.Argument(help="Its id.")],
    tags: Annotated[list[str], typer.Argument(help="key=value pairs; they replace those given before.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Give a device tags, for profiles and rollouts to match."""
    with client(context) as api:
        show_object(api.patch(f"/devices/{device_id}", {"tags": pairs(tags, "tags")}), output)


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
        api.delete(f"/devices/{device_id}")


@profile.command("list")
def list_profiles(context: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """List profiles."""
    with client(context) as api:
        show_rows(
            api.items("/profiles"),
            output,
            [
                ("profile", lambda row: row["name"]),
                ("runtime", lambda row: row["spec"]["runtime"]),
                ("precisions", lambda row: ", ".join(row["spec"]["precisions"])),
                ("match", lambda row: row["spec"]["match"]),
            ],
            empty="there is no profile yet; create one with `shoal profile create`",
        )


@profile.command("show")
def show_profile(context: typer.Context, name: NameArgument, output: OutputOption = Output.TABLE) -> None:
    """Show one profile, with how many devices have it."""
    with client(context) as api:
        found = api.get(f"/profiles/{name}")
        show_object(found if output is Output.JSON else {**found, **found.pop("spec")}, output)


@profile.command("create")
def create_profile(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Its name; may stand in the file.")] = None,
    file: Annotated[
        str | None, typer.Option("-f", "--file", help="YAML or JSON of a profile; - reads it from input.")
    ] = None,
    runtime: Annotated[str | None, typer.Option(help="onnx or litert.")] = None,
    match: Annotated[list[str], typer.Option(help="fact=value that must hold; repeat.")] = [],  # noqa: B006
    precision: Annotated[list[str], typer.Option(help="fp32, fp16, int8 or dynamic-int8; repeat.")] = [],  # noqa: B006
    output: OutputOption = Output.TABLE,
) -> None:
    """Create a profile from a file, from options, or from both (options win).

    Example: shoal profile create rpi4 --runtime litert --match arch=aarch64 --precision int8
    """
    wanted: dict[str, Any] = _read_profile(file) if file else {}
    if name:
        wanted["name"] = name
    if runtime:
        wanted["runtime"] = runtime
    if match:
        wanted["match"] = pairs(match, "--match")
    if precision:
        wanted["precisions"] = precision
    with client(context) as api:
        show_object(api.post("/profiles", wanted), output)


@profile.command("delete")
def delete_profile(context: typer.Context, name: NameArgument, yes: YesOption = False) -> None:  # noqa: FBT002
    """Delete a profile that no variant was built for."""
    confirm(f"delete profile {name}?", yes=yes)
    with client(context) as api:
        api.delete(f"/profiles/{name}")


def pairs(values: list[str], what: str) -> dict[str, str]:
    """key=value texts as a dictionary."""
    found = {}
    for value in values:
        key, equals, rest = value.partition("=")
        if not equals or not key:
            raise fail(f"{what}: {value!r} is not key=value", 2)
        found[key] = rest
    return found


def _read_profile(file: str) -> dict[str, Any]:
    import yaml

    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text()
        found = json.loads(text) if text.lstrip().startswith("{") else yaml.safe_load(text)
    except OSError as error:
        raise fail(f"-f: {file} can't be read: {error.strerror}", 2) from None
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise fail(f"-f: {file} is neither YAML nor JSON: {error}", 2) from None
    if not isinstance(found, dict):
        raise fail(f"-f: {file} does not hold one profile", 2)
    return found
