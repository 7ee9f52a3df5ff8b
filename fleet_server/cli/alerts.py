"""`shoal alert`: what fires, who is told, and what is told to nobody for a while."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any

import typer

from fleet_server.cli.alert_rules import rule
from fleet_server.cli.output import (
    IfMatchOption,
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
)
from fleet_server.cli.spans import seconds_of
from fleet_server.sdk import segment

alert = typer.Typer(no_args_is_help=True, help="Alerts: what fires, acknowledged, silenced, and who is told.")
route = typer.Typer(no_args_is_help=True, help="Routes: who is told of alerts, and how often.")
silence = typer.Typer(no_args_is_help=True, help="Silences: alerts that are told to nobody for a while.")
alert.add_typer(rule, name="rule")
alert.add_typer(route, name="route")
alert.add_typer(silence, name="silence")
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="The alert's id.")]
RouteArgument = Annotated[str, typer.Argument(metavar="NAME", help="The route's name.")]
SilenceArgument = Annotated[str, typer.Argument(metavar="ID", help="The silence's id.")]
SEVERITIES = "info, warning or critical"


@alert.command("ls")
def list_alerts(
    context: typer.Context,
    state: Annotated[
        str | None, typer.Option(help="pending, firing or resolved. Default: those that are open.")
    ] = None,
    severity: Annotated[str | None, typer.Option(help=f"Only of this one: {SEVERITIES}.")] = None,
    of_rule: Annotated[str | None, typer.Option("--rule", help="Only of this rule.")] = None,
    device: Annotated[str | None, typer.Option(help="Only of this device, and of models on it.")] = None,
    model: Annotated[str | None, typer.Option(help="Only of this model.")] = None,
    subject: Annotated[str | None, typer.Option(help='Such as "device/cam-*"; a * stands for any text.')] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """List alerts, newest first: those that fire, and those that are pending.

    Example: shoal alert ls --severity critical
    """
    wanted = [state] if state else ["firing", "pending"]
    given = {"severity": severity, "rule": of_rule, "device": device, "model": model, "subject": subject}
    with client(context) as api:
        rows = [row for one in wanted for row in api.items("/alerts", state=one, **given)]
        show_rows(
            rows,
            output,
            [
                ("id", lambda row: row["id"]),
                ("state", _state),
                ("severity", lambda row: row["severity"]),
                ("rule", lambda row: row["rule"]),
                ("subject", lambda row: row["subject"]),
                ("since", lambda row: row["since"][:19].replace("T", " ")),
                ("detail", lambda row: row["detail"]),
            ],
            empty="nothing fires",
        )


def _state(row: Json) -> str:
    quiet = " (silenced)" if row["silenced"] else ""
    by = f" ({row['acknowledged_by']})" if row["acknowledged_by"] and row["state"] == "firing" else ""
    return f"{row['state']}{quiet}{by}"


@alert.command("show")
def show(context: typer.Context, alert_id: IdArgument, output: OutputOption = Output.TABLE) -> None:
    """Show one alert."""
    with client(context) as api:
        found, etag = api.get_tagged(f"/alerts/{segment(alert_id)}")
        show_object({**found, "etag": etag}, output)


@alert.command("ack")
def acknowledge(
    context: typer.Context,
    alert_id: IdArgument,
    comment: Annotated[str, typer.Option(help="What you do about it.")] = "",
    if_match: IfMatchOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Acknowledge an alert: nobody is told again that it fires.

    Example: shoal alert ack 0190f0aa-0000-7000-8000-000000000000 --comment "a new switch is on its way"
    """
    with client(context) as api:
        path = f"/alerts/{segment(alert_id)}/acknowledge"
        show_object(api.post(path, {"comment": comment}, if_match=if_match), output)


@alert.command("counts")
def counts(context: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """Count open alerts by state and severity."""
    with client(context) as api:
        found = api.get("/alert-counts")
        if output is Output.JSON:
            print_json(found)
            return
        show_rows(
            found["items"],
            output,
            [
                ("state", lambda row: row["state"]),
                ("severity", lambda row: row["severity"]),
                ("acknowledged", lambda row: row["acknowledged"]),
                ("silenced", lambda row: row["silenced"]),
                ("count", lambda row: row["count"]),
            ],
            empty="nothing is pending, and nothing fires",
        )


# -- routes


@route.command("ls")
def list_routes(context: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """List who is told of alerts."""
    with client(context) as api:
        show_rows(
            api.items("/alert-routes"),
            output,
            [
                ("name", lambda row: row["name"]),
                ("by", lambda row: row["kind"]),
                ("to", lambda row: ", ".join(row["to"]) or None),
                ("from severity", lambda row: row["least_severity"]),
                ("rules", lambda row: ", ".join(row["rules"]) or "all"),
                ("repeats s", lambda row: row["repeat_s"] or None),
                ("on", lambda row: row["enabled"]),
            ],
            empty="nobody is told of alerts; create a route with `shoal alert route create`",
        )


@route.command("create")
def create_route(
    context: typer.Context,
    name: RouteArgument,
    kind: Annotated[str, typer.Option(help="webhook, email or mqtt.")],
    to: Annotated[list[str], typer.Option(help="An address, of email only; repeat.")] = [],  # noqa: B006
    severity: Annotated[str, typer.Option(help=f"Only rules as severe as this: {SEVERITIES}.")] = "info",
    rules: Annotated[list[str], typer.Option("--rule", help="Only this rule; repeat. Default: all.")] = [],  # noqa: B006
    wait: Annotated[str, typer.Option(help="How long news wait for others of their rule.")] = "30s",
    interval: Annotated[str, typer.Option(help="Shortest time between two notices of a rule.")] = "5m",
    repeat: Annotated[str, typer.Option(help="When what still fires is told again; 0: never.")] = "4h",
    output: OutputOption = Output.TABLE,
) -> None:
    """Create a route; it is told of what fires already.

    By webhook it tells those that subscribed to shoal.alert.*, by mqtt whoever listens to shoal/v1/alerts/FLEET.

    Example: shoal alert route create night --kind email --to ops@example.org --severity critical
    """
    body = {
        "name": name,
        "kind": kind,
        "to": to,
        "least_severity": severity,
        "rules": rules,
        "wait_s": seconds_of(wait, "--wait"),
        "interval_s": seconds_of(interval, "--interval"),
        "repeat_s": seconds_of(repeat, "--repeat"),
    }
    with client(context) as api:
        show_object(api.post("/alert-routes", body), output)


@route.command("show")
def show_route(context: typer.Context, name: RouteArgument, output: OutputOption = Output.TABLE) -> None:
    """Show one route, and what the mail server says."""
    with client(context) as api:
        found, etag = api.get_tagged(f"/alert-routes/{segment(name)}")
        show_object({**found, "etag": etag}, output)


@route.command("change")
def change_route(
    context: typer.Context,
    name: RouteArgument,
    to: Annotated[list[str], typer.Option(help="Its addresses from now on; repeat.")] = [],  # noqa: B006
    severity: Annotated[str | None, typer.Option(help=f"Only rules as severe as this: {SEVERITIES}.")] = None,
    rules: Annotated[list[str], typer.Option("--rule", help="Only these rules from now on; repeat.")] = [],  # noqa: B006
    wait: Annotated[str | None, typer.Option(help="How long news wait for others of their rule.")] = None,
    interval: Annotated[str | None, typer.Option(help="Shortest time between two notices of a rule.")] = None,
    repeat: Annotated[str | None, typer.Option(help="When what still fires is told again; 0: never.")] = None,
    enabled: Annotated[bool | None, typer.Option("--enable/--disable", help="Whether it is told.")] = None,
    if_match: IfMatchOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Change a route; what is not given stays.

    Example: shoal alert route change webhooks --severity warning --repeat 1d
    """
    given: dict[str, Any] = {
        "to": to or None,
        "least_severity": severity,
        "rules": rules or None,
        "wait_s": None if wait is None else seconds_of(wait, "--wait"),
        "interval_s": None if interval is None else seconds_of(interval, "--interval"),
        "repeat_s": None if repeat is None else seconds_of(repeat, "--repeat"),
        "enabled": enabled,
    }
    body = {key: value for key, value in given.items() if value is not None}
    if not body:
        raise fail("give something to change: see `shoal alert route change --help`", 2)
    with client(context) as api:
        show_object(api.patch(f"/alert-routes/{segment(name)}", body, if_match=if_match), output)


@route.command("test")
def send_test(context: typer.Context, name: RouteArgument, output: OutputOption = Output.TABLE) -> None:
    """Send a test notice by a route."""
    with client(context) as api:
        show_object(api.post(f"/alert-routes/{segment(name)}/test"), output)


@route.command("delete")
def delete_route(context: typer.Context, name: RouteArgument, yes: YesOption = False) -> None:  # noqa: FBT002
    """Delete a route; e-mails of it that wait go too."""
    confirm(f"delete alert route {name}?", yes=yes)
    with client(context) as api:
        api.delete(f"/alert-routes/{segment(name)}")


# -- silences


@silence.command("ls")
def list_silences(
    context: typer.Context,
    every: Annotated[bool, typer.Option("--all", help="Those too that ended, or have not begun.")] = False,  # noqa: FBT002
    output: OutputOption = Output.TABLE,
) -> None:
    """List silences that hold now."""
    with client(context) as api:
        show_rows(
            api.items("/alert-silences", active=None if every else "true"),
            output,
            [
                ("id", lambda row: row["id"]),
                ("rule", lambda row: row["rule"]),
                ("devices", lambda row: row["query"]),
                ("subject", lambda row: row["subject"]),
                ("from", lambda row: row["starts_at"][:16].replace("T", " ")),
                ("until", lambda row: row["ends_at"][:16].replace("T", " ")),
                ("by", lambda row: row["created_by"]),
                ("why", lambda row: row["comment"]),
            ],
            empty="nothing is silenced",
        )


@silence.command("create")
def create_silence(
    context: typer.Context,
    comment: Annotated[str, typer.Option(help="Why.")],
    lasts: Annotated[str, typer.Option("--for", help="How long from now: 90s, 30m, 2h, 1d.")] = "2h",
    of_rule: Annotated[str | None, typer.Option("--rule", help="Of this rule; a * stands for any text.")] = None,
    query: QueryOption = None,
    subject: Annotated[str | None, typer.Option(help='Such as "device/cam-*"; a * stands for any text.')] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Tell nobody for a while of alerts that match all that is given.

    Example: shoal alert silence create --query "site==plant7" --for 3h --comment "power works"
    """
    ends_at = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=seconds_of(lasts, "--for"))
    body = {"rule": of_rule, "query": query, "subject": subject, "ends_at": ends_at.isoformat(), "comment": comment}
    with client(context) as api:
        show_object(api.post("/alert-silences", body), output)


@silence.command("show")
def show_silence(context: typer.Context, silence_id: SilenceArgument, output: OutputOption = Output.TABLE) -> None:
    """Show one silence."""
    with client(context) as api:
        found, etag = api.get_tagged(f"/alert-silences/{segment(silence_id)}")
        show_object({**found, "etag": etag}, output)


@silence.command("end")
def end_silence(context: typer.Context, silence_id: SilenceArgument) -> None:
    """End a silence: what fires and was not told is told."""
    with client(context) as api:
        api.delete(f"/alert-silences/{segment(silence_id)}")
