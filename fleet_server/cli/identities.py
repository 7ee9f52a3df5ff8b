"""Identities in `shoal device`: enrolment tokens, approval, registration, lockout."""

from __future__ import annotations

import re
import sys
from typing import Annotated

import typer

from fleet_server.cli.output import (
    Output,
    OutputOption,
    YesOption,
    client,
    confirm,
    errors,
    fail,
    show_object,
    show_rows,
)
from fleet_server.cli.profiles import pairs
from fleet_server.sdk import segment

token = typer.Typer(no_args_is_help=True, help="Enrolment tokens: with one a device gets its certificate by itself.")
DeviceArgument = Annotated[str, typer.Argument(metavar="ID", help="The device's id.")]
RequestArgument = Annotated[str, typer.Argument(metavar="REQUEST", help="The request's id, as `shoal device pending`.")]
TagOption = Annotated[list[str] | None, typer.Option("--tag", help="key=value, given to the devices; repeatable.")]
_SPAN = re.compile(r"^(\d+)([smhd])\Z")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def seconds(text: str) -> int:
    """A span of time such as 90s, 15m, 1h or 7d, in seconds."""
    parts = _SPAN.match(text)
    if parts is None:
        raise fail(f"--ttl: {text!r} is no time such as 90s, 15m, 1h or 7d", 2)
    return int(parts[1]) * _SECONDS[parts[2]]


@token.command("create")
def create_token(
    context: typer.Context,
    uses: Annotated[int, typer.Option(help="How many devices may enrol with it.", min=1)] = 1,
    ttl: Annotated[str, typer.Option(help="How long it is valid: 90s, 15m, 1h, 7d.")] = "1h",
    device_id: Annotated[str | None, typer.Option("--device", help="The only device it is for.")] = None,
    tags: TagOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make an enrolment token; its text is shown this once.

    Example: shoal device token create --uses 20 --ttl 1h --tag site=plant7
    """
    body = {"uses": uses, "ttl_s": seconds(ttl), "device_id": device_id, "tags": pairs(tags or [], "--tag")}
    with client(context) as api:
        made = api.post("/enrolment-tokens", body)
    if output is Output.JSON:
        show_object(made, output)
        return
    sys.stdout.write(f"{made['token']}\n")  # whole on one line, for shells and for copying
    errors.print(f"for {made['uses_left']} device(s) until {made['expires_at']}; on each of them:")
    errors.print(f"  shoal-agent enroll --server {context.obj['url']} --token …")


@token.command("list")
def list_tokens(context: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """List enrolment tokens that can still be used."""
    with client(context) as api:
        show_rows(
            api.items("/enrolment-tokens"),
            output,
            [
                ("token", lambda row: row["id"]),
                ("uses left", lambda row: row["uses_left"]),
                ("until", lambda row: row["expires_at"]),
                ("device", lambda row: row["device_id"]),
                ("tags", lambda row: row["tags"]),
            ],
            empty="there is none; make one by `shoal device token create`",
        )


@token.command("delete")
def delete_token(
    context: typer.Context, token_id: Annotated[str, typer.Argument(metavar="TOKEN", help="Its id, not its text.")]
) -> None:
    """End an enrolment token; devices that enrolled with it stay."""
    with client(context) as api:
        api.delete(f"/enrolment-tokens/{segment(token_id)}")


def pending(context: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """List devices that wait for approval.

    Compare the key with the one that `shoal-agent enroll` shows on the device before you approve it.
    """
    with client(context) as api:
        show_rows(
            api.items("/enrolments", state="pending"),
            output,
            [
                ("request", lambda row: row["id"]),
                ("device", lambda row: row["device_id"]),
                ("key", lambda row: row["key_sha256"]),
                ("from", lambda row: row["address"]),
                ("why", lambda row: row["reason"]),
            ],
            empty="no device waits",
        )


def approve(context: typer.Context, request: RequestArgument, output: OutputOption = Output.TABLE) -> None:
    """Give a device that waits its certificate.

    Whoever held its id with another key is out; a device that was locked out is in again.
    """
    with client(context) as api:
        show_object(api.post(f"/enrolments/{segment(request)}/approve"), output)


def reject(context: typer.Context, request: RequestArgument, output: OutputOption = Output.TABLE) -> None:
    """Refuse a device that waits."""
    with client(context) as api:
        show_object(api.post(f"/enrolments/{segment(request)}/reject"), output)


def register(
    context: typer.Context,
    device_id: DeviceArgument,
    key_sha256: Annotated[
        str | None, typer.Option(help="Its key's SHA-256: with it the device enrols by itself, without a token.")
    ] = None,
    tags: TagOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Register a device before it first connects.

    Without --key-sha256 it needs a token, or approval.
    """
    body = {"device_id": device_id, "key_sha256": key_sha256, "tags": pairs(tags or [], "--tag")}
    with client(context) as api:
        show_object(api.post("/device-identities", body), output)


def identity(context: typer.Context, device_id: DeviceArgument, output: OutputOption = Output.TABLE) -> None:
    """Show a device's certificates, and whether it was out of order."""
    with client(context) as api:
        show_object(api.get(f"/devices/{segment(device_id)}/identity"), output)


def revoke(
    context: typer.Context,
    device_id: DeviceArgument,
    yes: YesOption = False,  # noqa: FBT002
    output: OutputOption = Output.TABLE,
) -> None:
    """Lock out a device that was lost.

    Its certificates are revoked, its connection is ended within seconds, and what it says is ignored.
    """
    confirm(f"lock out device {device_id}?", yes=yes)
    with client(context) as api:
        show_object(api.post(f"/devices/{segment(device_id)}/revoke"), output)


def authority(context: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """Show the fleet's CA and its pin (for --ca-pin and SHOAL_CA_FILE)."""
    with client(context) as api:
        found = api.get("/ca")
    if output is Output.JSON:
        show_object(found, output)
        return
    sys.stdout.write(found["certificate"])
    errors.print(f"pin: {found['pin']}")
