"""`shoal alert rule`: what is looked at, and when it is bad."""

from __future__ import annotations

from typing import Annotated, Any

import typer

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
    show_object,
    show_rows,
)
from fleet_server.cli.spans import seconds_of
from fleet_server.domain.alerting import Metric
from fleet_server.sdk import segment

rule = typer.Typer(no_args_is_help=True, help="Rules: what is looked at, and when it is bad.")
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The rule's name.")]
SeverityOption = Annotated[str | None, typer.Option(help="info, warning or critical. Default: warning.")]
ForOption = Annotated[str | None, typer.Option("--for", help="How long it must be bad before it fires: 90s, 5m, 2h.")]
KeepOption = Annotated[str | None, typer.Option("--keep", help="How long it must be well before it resolves.")]
WindowOption = Annotated[str | None, typer.Option(help="How much telemetry counts, such as 10m.")]
LeastOption = Annotated[int | None, typer.Option("--least-requests", help="Of fewer nothing is said.")]
ClearOption = Annotated[float | None, typer.Option(help="Well again on the other side of this.")]
ModelOption = Annotated[str | None, typer.Option(help="Only this model.")]
DescriptionOption = Annotated[str | None, typer.Option(help="What to do about it; told with the alert.")]


@rule.command("ls")
def list_rules(context: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """List alert rules."""
    with client(context) as api:
        show_rows(
            api.items("/alert-rules"),
            output,
            [
                ("name", lambda row: row["name"]),
                ("holds where", _condition),
                ("for s", lambda row: row["for_s"] or None),
                ("severity", lambda row: row["severity"]),
                ("devices", lambda row: row["query"]),
                ("on", lambda row: row["problem"] or row["enabled"]),
            ],
            empty="there is no alert rule; create one with `shoal alert rule create`",
        )


def _condition(row: Json) -> str:
    model = f" of {row['model']}" if row["model"] else ""
    if row["threshold"] is None:
        return f"{row['metric']}{model}"
    return f"{row['metric']}{model} {'<' if row['below'] else '>'} {row['threshold']:g} {row['unit']}"


@rule.command("show")
def show(context: typer.Context, name: NameArgument, output: OutputOption = Output.TABLE) -> None:
    """Show one rule, with how many alerts of it fire."""
    with client(context) as api:
        found, etag = api.get_tagged(f"/alert-rules/{segment(name)}")
        show_object({**found, "etag": etag}, output)


@rule.command("create")
def create(
    context: typer.Context,
    name: NameArgument,
    metric: Annotated[str, typer.Option(help=f"What is looked at: {', '.join(Metric)}.")],
    above: Annotated[float | None, typer.Option(help="Bad above this.")] = None,
    below: Annotated[float | None, typer.Option(help="Bad below this.")] = None,
    clear: ClearOption = None,
    window: WindowOption = None,
    least_requests: LeastOption = None,
    lasts: ForOption = None,
    keep: KeepOption = None,
    severity: SeverityOption = None,
    query: QueryOption = None,
    model: ModelOption = None,
    description: DescriptionOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Create an alert rule.

    Example: shoal alert rule create slow --metric latency_p95_ms --above 50 --for 5m
    """
    body = {"name": name, "metric": metric} | _fields(
        above, below, clear, window, least_requests, lasts, keep, severity, query, model, description
    )
    with client(context) as api:
        show_object(api.post("/alert-rules", body), output)


@rule.command("change")
def change(
    context: typer.Context,
    name: NameArgument,
    above: Annotated[float | None, typer.Option(help="Bad above this.")] = None,
    below: Annotated[float | None, typer.Option(help="Bad below this.")] = None,
    clear: ClearOption = None,
    window: WindowOption = None,
    least_requests: LeastOption = None,
    lasts: ForOption = None,
    keep: KeepOption = None,
    severity: SeverityOption = None,
    query: QueryOption = None,
    model: ModelOption = None,
    description: DescriptionOption = None,
    enabled: Annotated[bool | None, typer.Option("--enable/--disable", help="Whether it is looked at.")] = None,
    if_match: IfMatchOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Change a rule; what is not given stays.

    Example: shoal alert rule change offline --for 15m --severity critical
    """
    body = _fields(above, below, clear, window, least_requests, lasts, keep, severity, query, model, description)
    if enabled is not None:
        body["enabled"] = enabled
    if not body:
        raise fail("give something to change: see `shoal alert rule change --help`", 2)
    with client(context) as api:
        show_object(api.patch(f"/alert-rules/{segment(name)}", body, if_match=if_match), output)


@rule.command("delete")
def delete(context: typer.Context, name: NameArgument, yes: YesOption = False) -> None:  # noqa: FBT002
    """Delete a rule; its alerts resolve."""
    confirm(f"delete alert rule {name}?", yes=yes)
    with client(context) as api:
        api.delete(f"/alert-rules/{segment(name)}")


def _fields(
    above: float | None,
    below: float | None,
    clear: float | None,
    window: str | None,
    least_requests: int | None,
    lasts: str | None,
    keep: str | None,
    severity: str | None,
    query: str | None,
    model: str | None,
    description: str | None,
) -> dict[str, Any]:
    """What was given of a rule, as the API has it."""
    if above is not None and below is not None:
        raise fail("give --above or --below, not both", 2)
    threshold = above if below is None else below
    given: dict[str, Any] = {
        "threshold": threshold,
        "below": None if threshold is None else below is not None,
        "clear": clear,
        "window_s": None if window is None else seconds_of(window, "--window"),
        "least_requests": least_requests,
        "for_s": None if lasts is None else seconds_of(lasts, "--for"),
        "keep_s": None if keep is None else seconds_of(keep, "--keep"),
        "severity": severity,
        "query": query,
        "model": model,
        "description": description,
    }
    return {name: value for name, value in given.items() if value is not None}
