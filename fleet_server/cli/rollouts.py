"""`shoal rollout` and `shoal audit`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar

from fleet_server.cli import probation as watching
from fleet_server.cli.documents import read_document
from fleet_server.cli.judging import show_comparison, show_explanation, show_preview
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
    show_object,
    show_rows,
    waits,
)
from fleet_server.cli.profiles import ActivateOption, BudgetOption, DownloadOption, RateOption, delivery, pairs
from fleet_server.sdk import Client, segment

rollout = typer.Typer(no_args_is_help=True, help="Rollouts: move devices to a version in stages, judged as they go.")
audit = typer.Typer(no_args_is_help=True, help="Audit: what was done, and by whom.")
RolloutArgument = Annotated[str, typer.Argument(metavar="ID", help="The rollout's id.")]
CommentOption = Annotated[str, typer.Option("-m", "--comment", help="Why; it is kept.")]
_STAGE = re.compile(r"^(\d+(?:\.\d+)?)%(?::(\d+(?:\.\d+)?)(s|m|h))?$")
_RULE = re.compile(r"^([a-z0-9_]+)>(\d+(?:\.\d+)?)(?::(\d+))?(?:@(0?\.\d+|0))?(?:/(control|past))?$")
COUNTED = ("active", "in_progress", "scheduled", "failed", "superseded")
WATCHED = 20  # rows of devices a person can follow
_SECONDS = {"s": 1, "m": 60, "h": 3600}


@rollout.command("create")
def create(
    context: typer.Context,
    reference: Annotated[
        str | None,
        typer.Argument(metavar="MODEL@VERSION", help="The version, or shoal-agent@VERSION; else the file names it."),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option("-f", "--file", help="YAML or JSON of a rollout (`shoal rollout schema`); options win over it."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would do.")] = False,  # noqa: FBT002
    everything: Annotated[bool, typer.Option("--all", help="To the whole fleet.")] = False,  # noqa: FBT002
    device: Annotated[list[str], typer.Option(help="To this device; repeat.")] = [],  # noqa: B006
    profile: Annotated[list[str], typer.Option(help="To devices of this profile; repeat.")] = [],  # noqa: B006
    tag: Annotated[list[str], typer.Option(help="To devices with this key=value; repeat.")] = [],  # noqa: B006
    query: QueryOption = None,
    stages: Annotated[
        str | None, typer.Option(help="Cumulative shares, each with how long to watch. Default: 10%:60s,100%.")
    ] = None,
    stop_when: Annotated[
        list[str],
        typer.Option(
            help=(
                '"metric>number:samples@confidence/control", all but the first two by choice; repeat. '
                "Metrics: failed_percent, "
                "install_failed_percent, rolled_back_percent, fell_back_percent, error_percent, accuracy_drop_points, "
                "error_rise_points, latency_p95_ms, latency_p50_ratio, latency_p95_ratio, latency_p99_ratio, "
                "throughput_drop_percent, memory_rise_mb, temperature_c, temperature_rise_c, "
                "confidence_drop_points, confidence_shift, output_drift, input_drift, crashed_windows_percent, "
                "disagreement_percent. "
                "Default: failed_percent>5, error_percent>1:100."
            )
        ),
    ] = [],  # noqa: B006
    on_stop: Annotated[
        str | None, typer.Option(help="What a stop rule does: pause or revert. Default: revert.")
    ] = None,
    probation: Annotated[str | None, typer.Option(help=watching.HELP)] = None,
    on_busy: Annotated[
        str | None, typer.Option(help="When another rollout has not settled a device: refuse or supersede.")
    ] = None,
    allow_unproven: Annotated[bool, typer.Option(help="Also variants that no device has measured.")] = False,  # noqa: FBT002
    rate: RateOption = None,
    budget: BudgetOption = [],  # noqa: B006
    download: DownloadOption = [],  # noqa: B006
    activate: ActivateOption = [],  # noqa: B006
    name: Annotated[str | None, typer.Option(help="What to call it.")] = None,
    watch_it: Annotated[bool, typer.Option("--watch", help="Follow it until it stands still.")] = False,  # noqa: FBT002
    output: OutputOption = Output.TABLE,
) -> None:
    """Roll a version out to devices, in stages.

    Every profile of the devices needs a variant that passed the gate, on a device (`shoal gate run`).
    Where the fleet asks for approvals, it waits for those first (`shoal rollout approve`).

    Example: shoal rollout create mnist@2 --all --stages "10%:60s,100%" --stop-when "failed_percent>5" --watch
    """
    written: dict[str, Any] = read_document(file, "rollout") if file else {}
    strategy: dict[str, Any] = dict(written.get("strategy") or {})
    if stages:
        strategy["stages"] = [_stage(part) for part in stages.split(",")]
    if stop_when:
        strategy["stop_when"] = [_rule(part) for part in stop_when]
    if on_stop:
        strategy["on_stop"] = on_stop
    if probation:
        strategy["probation"] = watching.parse(probation)
    given = {"all": everything, "devices": device, "profiles": profile, "tags": pairs(tag, "--tag"), "query": query}
    target = {**(written.get("target") or {}), **{key: value for key, value in given.items() if value}}
    more = {
        "version": reference,
        "name": name,
        "on_busy": on_busy,
        "allow_unproven": allow_unproven or None,
        "delivery": delivery(rate, budget, download, activate),
    }
    body = {**written, **{key: value for key, value in more.items() if value is not None}}
    body = {**body, "target": target, "strategy": strategy}
    if "version" not in body:
        raise fail("MODEL@VERSION: name the version to roll out, here or as `version` in the file", 2)
    with client(context) as api:
        if dry_run:
            found = api.post("/rollouts/dry-run", body)
            show_preview(found, output)
            raise typer.Exit(0 if found["starts"] else 1)
        created = api.post("/rollouts", body)
        if watch_it:
            created = _follow(api, created["id"])
        show_object(_brief(created) if output is Output.TABLE else created, output)
        if watch_it and created["state"] != "succeeded":
            raise typer.Exit(1)


def _stage(text: str) -> Json:
    found = _STAGE.match(text.strip())
    if not found:
        raise fail(f"--stages: {text!r} is not a share such as 10% or 10%:60s", 2)
    return {"percent": float(found[1]), "soak_s": float(found[2] or 0) * _SECONDS[found[3] or "s"]}


def _rule(text: str) -> Json:
    found = _RULE.match(text.replace(" ", ""))
    if not found:
        raise fail(f"--stop-when: {text!r} is not metric>number or metric>number:samples@confidence/control", 2)
    rule: Json = {"metric": found[1], "above": float(found[2]), "min_samples": int(found[3] or 1)}
    if found[4]:
        rule["confidence"] = float(found[4])
    return rule | ({"against": found[5]} if found[5] else {})


@rollout.command("list")
def list_rollouts(
    context: typer.Context,
    state: Annotated[str | None, typer.Option(help="Only those in this state.")] = None,
    model: Annotated[str | None, typer.Option(help="Only those of this model.")] = None,
    version: Annotated[str | None, typer.Option(help="Only of this model@version, or shoal-agent@version.")] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """List rollouts, newest first."""
    with client(context) as api:
        show_rows(
            api.items("/rollouts", state=state, model=model, version=version),
            output,
            [
                ("id", lambda row: row["id"]),
                ("version", lambda row: f"{row['model']}@{row['version']}"),
                ("state", lambda row: row["state"]),
                ("stage", lambda row: f"{row['stage'] + 1}/{row['stages']}"),
                ("active", lambda row: f"{row['counts']['active']}/{row['counts']['total']}"),
            ],
            empty="there is no rollout yet; create one with `shoal rollout create`",
        )


@rollout.command("show")
def show(context: typer.Context, rollout_id: RolloutArgument, output: OutputOption = Output.TABLE) -> None:
    """Show a rollout: every judgement with its reason, and where each device is."""
    with client(context) as api:
        found = api.get(f"/rollouts/{segment(rollout_id)}")
        deployments = list(api.items(f"/rollouts/{segment(rollout_id)}/deployments"))
        if output is Output.JSON:
            print_json({"rollout": found, "deployments": deployments})
            return
        show_object(_brief(found), output)
        show_rows(deployments, output, DEPLOYMENT_COLUMNS, empty="it has no deployment")


@rollout.command("watch")
def watch(context: typer.Context, rollout_id: RolloutArgument, output: OutputOption = Output.TABLE) -> None:
    """Follow a rollout until it stands still; exit 1 unless it succeeded."""
    with client(context) as api:
        found = _follow(api, rollout_id)
        show_object(_brief(found) if output is Output.TABLE else found, output)
        if found["state"] != "succeeded":
            raise typer.Exit(1)


@rollout.command("approve")
def approve(
    context: typer.Context,
    rollout_id: RolloutArgument,
    comment: CommentOption = "",
    output: OutputOption = Output.TABLE,
) -> None:
    """Approve a rollout that another created; with the last one it starts."""
    with client(context) as api:
        show_object(_brief(api.post(f"/rollouts/{segment(rollout_id)}/approve", {"comment": comment})), output)


@rollout.command("reject")
def reject(
    context: typer.Context,
    rollout_id: RolloutArgument,
    comment: CommentOption = "",
    output: OutputOption = Output.TABLE,
) -> None:
    """End a rollout that waits for approvals; nothing was sent."""
    with client(context) as api:
        show_object(_brief(api.post(f"/rollouts/{segment(rollout_id)}/reject", {"comment": comment})), output)


@rollout.command("pause")
def pause(context: typer.Context, rollout_id: RolloutArgument, output: OutputOption = Output.TABLE) -> None:
    """Send no further stage; devices that were told go on."""
    with client(context) as api:
        show_object(_brief(api.post(f"/rollouts/{segment(rollout_id)}/pause")), output)


@rollout.command("resume")
def resume(context: typer.Context, rollout_id: RolloutArgument, output: OutputOption = Output.TABLE) -> None:
    """Go on with a paused rollout."""
    with client(context) as api:
        show_object(_brief(api.post(f"/rollouts/{segment(rollout_id)}/resume")), output)


@rollout.command("explain")
def explain(context: typer.Context, rollout_id: RolloutArgument, output: OutputOption = Output.TABLE) -> None:
    """Explain a rollout: what it does now and why, and where its rules stand."""
    with client(context) as api:
        show_explanation(api.get(f"/rollouts/{segment(rollout_id)}/explain"), output)


@rollout.command("compare")
def compare(context: typer.Context, rollout_id: RolloutArgument, output: OutputOption = Output.TABLE) -> None:
    """Compare its devices with what they did before, by profile.

    Figures stand with their 95 % confidence intervals.
    """
    with client(context) as api:
        show_comparison(api.get(f"/rollouts/{segment(rollout_id)}/comparison"), output)


@rollout.command("promote")
def promote(
    context: typer.Context,
    rollout_id: RolloutArgument,
    full: Annotated[bool, typer.Option("--full", help="All stages at once, unwatched.")] = False,  # noqa: FBT002
    output: OutputOption = Output.TABLE,
) -> None:
    """Let the next stage begin, where it waits for somebody to let it."""
    with client(context) as api:
        show_object(_brief(api.post(f"/rollouts/{segment(rollout_id)}/promote", {"full": full})), output)


@rollout.command("retry")
def retry(context: typer.Context, rollout_id: RolloutArgument, output: OutputOption = Output.TABLE) -> None:
    """Try again on the devices that failed, and on no other."""
    with client(context) as api:
        show_object(_brief(api.post(f"/rollouts/{segment(rollout_id)}/retry")), output)


@rollout.command("schema")
def schema(context: typer.Context) -> None:
    """Print the JSON Schema of a rollout's file, as the server takes it."""
    with client(context) as api:
        print_json(api.get("/schemas/rollout"))


@rollout.command("abort")
def abort(
    context: typer.Context,
    rollout_id: RolloutArgument,
    revert: Annotated[bool, typer.Option(help="Also take devices back to what they ran before.")] = False,  # noqa: FBT002
    output: OutputOption = Output.TABLE,
) -> None:
    """End a rollout: devices that have the version keep it, or go back.

    Example: shoal rollout abort 01a2… --revert
    """
    with client(context) as api:
        show_object(_brief(api.post(f"/rollouts/{segment(rollout_id)}/abort", {"revert": revert})), output)


@audit.command("list")
def list_audit(
    context: typer.Context,
    limit: Annotated[int, typer.Option(help="How many rows.", min=1, max=500)] = 50,
    output: OutputOption = Output.TABLE,
) -> None:
    """What was done, newest first."""
    with client(context) as api:
        show_rows(
            api.get("/audit-events", limit=limit)["items"],
            output,
            [
                ("at", lambda row: row["at"][:19]),
                ("actor", lambda row: row["actor"]),
                ("from", lambda row: row["address"] or None),
                ("action", lambda row: row["action"]),
                ("subject", lambda row: row["subject"]),
            ],
            empty="nothing was done yet",
        )


@audit.command("verify")
def verify_audit(context: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """Walk the log's hash chain; exit 1 where it is broken.

    Keep the hash of the newest event elsewhere: if it is not in the log later, events were cut off.
    """
    with client(context) as api:
        found = api.get("/audit-events/verify")
        shown = {**found, "broken": found["broken"] and found["broken"]["reason"]}
        show_object(found if output is Output.JSON else shown, output)
        if not found["whole"]:
            raise typer.Exit(1)


def _follow(api: Client, rollout_id: str) -> Json:
    """Follow a rollout: a live table of its devices on a terminal, else a line for every change."""
    found: Json = {}
    said = ""
    with Live(console=errors, transient=True, auto_refresh=False, screen=False) as live:
        for found in api.watch_rollout(rollout_id):
            line = _standing(found)
            if errors.is_terminal:
                deployments = api.get(f"/rollouts/{segment(rollout_id)}/deployments", limit=500)["items"]
                live.update(_picture(found, line, deployments), refresh=True)
            elif line != said:
                errors.print(line)
            said = line
    return found


def _standing(found: Json) -> str:
    counts = ", ".join(f"{found['counts'][name]} {name.replace('_', ' ')}" for name in COUNTED if found["counts"][name])
    return f"{found['state']}, stage {found['stage'] + 1} of {found['stages']}: {counts}"


def _picture(found: Json, line: str, deployments: list[Json]) -> RenderableType:
    """What stands still comes last: on a big fleet a person wants to see what moves and what failed."""
    order = {"failed": 0, "rolled_back": 0, "scheduled": 2, "active": 3, "superseded": 3}
    shown = sorted(deployments, key=lambda row: (order.get(row["phase"], 1), row["device_id"]))[:WATCHED]
    counts = found["counts"]
    done = counts["active"] + counts["failed"] + counts["superseded"]
    parts: list[RenderableType] = [line, ProgressBar(total=max(counts["total"], 1), completed=done, width=60)]
    parts.append(rows_table(shown, DEPLOYMENT_COLUMNS))
    if counts["total"] > len(shown):
        parts.append(f"… and {counts['total'] - len(shown)} more")
    return Group(*parts)


def _brief(found: Json) -> Json:
    verdicts = [
        f"{one['at'][:19]} stage {one['stage'] + 1} {one['decision']}: {one['reason']}" for one in found["verdicts"]
    ]
    return {
        "id": found["id"],
        "version": f"{found['model']}@{found['version']}",
        "state": found["state"],
        "stage": f"{found['stage'] + 1} of {found['stages']}",
        "created by": found["created_by"],
        "approvals": f"{len(found['approvals'])} of {found['approvals_needed']}" if found["approvals_needed"] else None,
        "devices": ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in found["counts"].items() if count),
        "delivery": found["delivery"],
        "verdicts": "\n".join(verdicts),
    }


def _progress(row: Json) -> str | None:
    """How much of the artifact has come, while it is coming."""
    if row["phase"] != "downloading" or not row["artifact_bytes"]:
        return None
    return f"{min(100, 100 * row['received_bytes'] // row['artifact_bytes'])} %"


def _travelled(row: Json) -> str | None:
    """What came over the wire, and by which codec where the artifact did not come as it is."""
    if not row["received_bytes"]:
        return None
    return f"{row['received_bytes']:,}" + (f" ({row['encoding']})" if row["encoding"] else "")


def _why(row: Json) -> str | None:
    """Why it failed, or what it waits for."""
    if row["failure"]:
        return str(row["failure"]["detail"])
    return waits(row["waiting"]) if row["waiting"] else None


DEPLOYMENT_COLUMNS: list[tuple[str, Callable[[Json], object]]] = [
    ("device", lambda row: row["device_id"]),
    ("profile", lambda row: row["profile"]),
    ("stage", lambda row: row["stage"] + 1),
    ("phase", lambda row: row["phase"]),
    ("got", _progress),
    ("bytes", _travelled),
    ("seconds", lambda row: row["deploy_s"]),
    ("seen", watching.seen),
    ("why", _why),
]
