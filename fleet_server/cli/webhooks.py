"""`shoal webhook`: events told by HTTP."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from fleet_server.cli.output import (
    IfMatchOption,
    Output,
    OutputOption,
    YesOption,
    client,
    confirm,
    fail,
    show_object,
    show_rows,
)
from fleet_server.sdk import segment

webhook = typer.Typer(no_args_is_help=True, help="Webhooks: events told by HTTP, signed, and tried again.")
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="The webhook's id.")]
TypesOption = Annotated[
    list[str], typer.Option("--type", help='Events to tell of, such as "shoal.rollout.*"; repeat. Default: all.')
]
POLL_S = 0.5


@webhook.command("create")
def create(
    context: typer.Context,
    url: Annotated[str, typer.Argument(help="Where to send them: https://….")],
    types: TypesOption = ["*"],  # noqa: B006
    description: Annotated[str, typer.Option(help="What it is for.")] = "",
    secret: Annotated[str | None, typer.Option(help="whsec_… of your own; made when absent.")] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Create a webhook, and print its secret, this once.

    Example: shoal webhook create https://ops.example/hooks --type "shoal.rollout.*"
    """
    body = {"url": url, "types": types, "description": description, "secret": secret}
    with client(context) as api:
        show_object(api.post("/webhooks", body), output)


@webhook.command("list")
def list_webhooks(context: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """List webhooks."""
    with client(context) as api:
        show_rows(
            api.items("/webhooks"),
            output,
            [
                ("id", lambda row: row["id"]),
                ("url", lambda row: row["url"]),
                ("events", lambda row: ", ".join(row["types"])),
                ("active", lambda row: row["stopped_because"] or row["active"]),
                ("for", lambda row: row["description"] or None),
            ],
            empty="there is no webhook yet; create one with `shoal webhook create`",
        )


@webhook.command("show")
def show(context: typer.Context, webhook_id: IdArgument, output: OutputOption = Output.TABLE) -> None:
    """Show one webhook, without its secret."""
    with client(context) as api:
        found, etag = api.get_tagged(f"/webhooks/{segment(webhook_id)}")
        show_object({**found, "etag": etag}, output)


@webhook.command("change")
def change(
    context: typer.Context,
    webhook_id: IdArgument,
    url: Annotated[str | None, typer.Option(help="Where to send events from now on.")] = None,
    types: TypesOption = [],  # noqa: B006
    description: Annotated[str | None, typer.Option(help="What it is for.")] = None,
    active: Annotated[bool | None, typer.Option("--active/--inactive", help="Whether it is told of events.")] = None,
    if_match: IfMatchOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Change a webhook; what is not given stays.

    Example: shoal webhook change 0190f0aa-0000-7000-8000-000000000000 --inactive
    """
    given: dict[str, Any] = {"url": url, "types": types or None, "description": description, "active": active}
    body = {key: value for key, value in given.items() if value is not None}
    if not body:
        raise fail("give --url, --type, --description, --active or --inactive", 2)
    with client(context) as api:
        show_object(api.patch(f"/webhooks/{segment(webhook_id)}", body, if_match=if_match), output)


@webhook.command("rotate")
def rotate(
    context: typer.Context,
    webhook_id: IdArgument,
    overlap_hours: Annotated[float, typer.Option(help="How long the old secret signs too.", min=0)] = 24.0,
    output: OutputOption = Output.TABLE,
) -> None:
    """Change the secret; the one before signs too for a while."""
    with client(context) as api:
        body = {"overlap_hours": overlap_hours}
        show_object(api.post(f"/webhooks/{segment(webhook_id)}/rotate-secret", body), output)


@webhook.command("delete")
def delete(context: typer.Context, webhook_id: IdArgument, yes: YesOption = False) -> None:  # noqa: FBT002
    """Delete a webhook, with all that it was told or was to be told."""
    confirm(f"delete webhook {webhook_id} and its deliveries?", yes=yes)
    with client(context) as api:
        api.delete(f"/webhooks/{segment(webhook_id)}")


@webhook.command("test")
def send_test(
    context: typer.Context,
    webhook_id: IdArgument,
    wait: Annotated[float, typer.Option(help="Seconds to wait for the receiver's answer.", min=0)] = 15.0,
    output: OutputOption = Output.TABLE,
) -> None:
    """Send a test event, and show what the receiver said to it.

    Exit code 1 unless it took it.
    """
    with client(context) as api:
        found = api.post(f"/webhooks/{segment(webhook_id)}/test")
        until = time.monotonic() + wait
        while found["state"] == "pending" and not found["attempts"] and time.monotonic() < until:
            time.sleep(POLL_S)
            found = api.get(f"/webhook-deliveries/{segment(found['id'])}")
        show_object(found, output)
        if found["state"] != "delivered":
            raise typer.Exit(1)


@webhook.command("deliveries")
def deliveries(
    context: typer.Context,
    webhook_id: Annotated[str | None, typer.Option("--webhook", help="Only to this one.")] = None,
    dead: Annotated[bool, typer.Option("--dead", help="Only those that were given up.")] = False,  # noqa: FBT002
    state: Annotated[str | None, typer.Option(help="pending, delivered or dead.")] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """List what was sent, is to be sent, or was given up, newest first."""
    with client(context) as api:
        show_rows(
            api.items("/webhook-deliveries", webhook=webhook_id, state="dead" if dead else state),
            output,
            [
                ("id", lambda row: row["id"]),
                ("event", lambda row: row["type"]),
                ("subject", lambda row: row["subject"]),
                ("state", lambda row: row["state"]),
                ("tries", lambda row: row["attempts"]),
                ("last answer", lambda row: row["last_detail"] or None),
            ],
            empty="nothing was sent",
        )


@webhook.command("redeliver")
def redeliver(
    context: typer.Context,
    delivery_id: Annotated[str, typer.Argument(metavar="DELIVERY", help="The delivery's id.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Send a delivery again: a dead letter, or one that was delivered."""
    with client(context) as api:
        show_object(api.post(f"/webhook-deliveries/{segment(delivery_id)}/redeliver"), output)
