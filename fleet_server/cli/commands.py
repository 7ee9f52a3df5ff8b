"""`shoal command`, and the commands to one device of `shoal device`."""

from __future__ import annotations

import datetime as dt
import json
import sys
import time
from typing import Annotated, Any

import typer

from fleet_server.cli.output import (
    Json,
    Output,
    OutputOption,
    QueryOption,
    client,
    errors,
    fail,
    print_json,
    show_object,
    show_rows,
)
from fleet_server.sdk import Client, ConflictError, segment

command = typer.Typer(no_args_is_help=True, help="Commands: what devices are asked to do at once.")
DeviceArgument = Annotated[str, typer.Argument(metavar="ID", help="The device's id.")]
CommandArgument = Annotated[str, typer.Argument(metavar="ID", help="The command's id.")]
TimeoutOption = Annotated[float, typer.Option(help="Seconds until it ends at the latest, waiting for the device too.")]
WaitOption = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is over.")]
LinesOption = Annotated[int, typer.Option(help="How many of the newest lines come at first.")]
LevelOption = Annotated[str, typer.Option(help="DEBUG, INFO, WARNING, ERROR or CRITICAL, and above.")]
SecondsOption = Annotated[float, typer.Option(help="How long each model is run.")]
ModelOption = Annotated[list[str], typer.Option(help="Only this model; repeat.")]
OPEN = frozenset({"queued", "sent", "running"})
POLL_S = 0.3


def restart_runtime(
    context: typer.Context,
    device_id: DeviceArgument,
    timeout: TimeoutOption = 300.0,
    wait: WaitOption = True,  # noqa: FBT002
    output: OutputOption = Output.TABLE,
) -> None:
    """Replace the process that runs models on a device.

    Requests that it has begun are answered, those that come wait for the next one. Exit code 1 where it failed.

    Example: shoal device restart-runtime camera-01
    """
    _ask(context, device_id, {"kind": "restart-runtime", "timeout_s": timeout}, output, wait=wait)


def benchmark(
    context: typer.Context,
    device_id: DeviceArgument,
    model: ModelOption = [],  # noqa: B006
    seconds: SecondsOption = 5.0,
    timeout: TimeoutOption = 600.0,
    wait: WaitOption = True,  # noqa: FBT002
    output: OutputOption = Output.TABLE,
) -> None:
    """Benchmark the models that a device serves, as it is now.

    Each is run in a process of its own, with its golden inputs or zeros: nothing of it is in the telemetry.

    Example: shoal device benchmark camera-01 --seconds 10
    """
    body = {"kind": "benchmark", "models": model, "seconds": seconds, "timeout_s": timeout}
    _ask(context, device_id, body, output, wait=wait)


def measure(
    context: typer.Context,
    device_id: DeviceArgument,
    timeout: TimeoutOption = 300.0,
    wait: WaitOption = True,  # noqa: FBT002
    output: OutputOption = Output.TABLE,
) -> None:
    """Let a device measure its facts again, and say which have changed."""
    _ask(context, device_id, {"kind": "facts", "timeout_s": timeout}, output, wait=wait)


def identify(
    context: typer.Context,
    device_id: DeviceArgument,
    timeout: TimeoutOption = 300.0,
    wait: WaitOption = True,  # noqa: FBT002
    output: OutputOption = Output.TABLE,
) -> None:
    """Let a device show itself: it runs commands.identify_program."""
    _ask(context, device_id, {"kind": "identify", "timeout_s": timeout}, output, wait=wait)


def logs(
    context: typer.Context,
    device_id: DeviceArgument,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with what is logged from now on.")] = False,  # noqa: FBT002
    lines: LinesOption = 200,
    level: LevelOption = "INFO",
    timeout: TimeoutOption = 3600.0,
    output: OutputOption = Output.TABLE,
) -> None:
    """Print the log of a device's agent and of its inference worker.

    With -f until Ctrl-C, or until --timeout is over. With -o json an object a line. Audited as every command is.

    Example: shoal device logs camera-01 -f --level WARNING
    """
    body = {"kind": "logs", "lines": lines, "follow": follow, "level": level.upper(), "timeout_s": timeout}
    with client(context) as api:
        asked = api.post(f"/devices/{segment(device_id)}/commands", body)
        try:
            last = _print_log(api, asked, output)
        except KeyboardInterrupt:
            _cancel_quietly(api, asked["id"])
            raise typer.Exit(0) from None
    if last["log_dropped"]:
        errors.print(f"{last['log_dropped']} lines were lost: more was logged than the device keeps")
    if last["state"] != "succeeded":
        raise fail(f"{last['state']}: {last['detail']}")


def _print_log(api: Client, asked: Json, output: Output) -> Json:
    if asked["state"] == "queued":
        errors.print(f"{asked['device_id']} is offline: waiting for it")
    for kind, data in api.follow(f"/commands/{segment(asked['id'])}/logs"):
        if kind == "end":
            return data
        if output is Output.JSON:
            _print_line(data)
        else:
            sys.stdout.write(f"{_moment(data['at'])} {data['level']:<7} {data['source']}: {data['text']}\n")
        sys.stdout.flush()
    raise fail("the server ended the log without saying how the command ended: see `shoal command show`")


def _print_line(data: Json) -> None:
    """One object on one line of standard output."""
    sys.stdout.write(json.dumps(data, separators=(",", ":")) + "\n")


def _moment(unix_s: float) -> str:
    return dt.datetime.fromtimestamp(unix_s, dt.UTC).strftime("%Y-%m-%d %H:%M:%S")


def _cancel_quietly(api: Client, command_id: str) -> None:
    try:
        api.post(f"/commands/{segment(command_id)}/cancel")
    except ConflictError:
        return  # it ended meanwhile


def _ask(context: typer.Context, device_id: str, body: Json, output: Output, *, wait: bool) -> None:
    with client(context) as api:
        found = api.post(f"/devices/{segment(device_id)}/commands", body)
        if wait:
            found = _await_end(api, found)
        _show(found, output)
        if wait and found["state"] != "succeeded":
            raise typer.Exit(1)


def _await_end(api: Client, found: Json) -> Json:
    if found["state"] == "queued":
        errors.print(f"{found['device_id']} is offline: waiting for it")
    while found["state"] in OPEN:
        time.sleep(POLL_S)
        found = api.get(f"/commands/{segment(found['id'])}")
    return found


def _show(found: Json, output: Output) -> None:
    if output is Output.JSON:
        print_json(found)
        return
    result = dict(found["result"] or {})
    benchmarks = result.pop("benchmarks", [])
    fields = ("id", "device_id", "kind", "state", "detail", "created_by", "deadline_at")
    show_object({name: found[name] or None for name in fields} | result, output)
    if benchmarks:
        show_rows(benchmarks, output, _BENCHMARK_COLUMNS, empty="")


def _number(name: str) -> Any:
    return lambda row: None if row.get("failure") else row.get(name)


_BENCHMARK_COLUMNS: list[tuple[str, Any]] = [
    ("model", lambda row: f"{row['model']}@{row['version']}"),
    ("runs on", lambda row: row.get("provider")),
    ("p50 ms", _number("latency_p50_ms")),
    ("p95 ms", _number("latency_p95_ms")),
    ("p99 ms", _number("latency_p99_ms")),
    ("rows/s", _number("rows_per_s")),
    ("batch", lambda row: row.get("batch")),
    ("rows/s in it", lambda row: row.get("batch_rows_per_s")),
    ("why not", lambda row: row.get("failure")),
]


@command.command("send")
def send(
    context: typer.Context,
    kind: Annotated[str, typer.Argument(help="restart-runtime, logs, benchmark, facts or identify.")],
    device: Annotated[list[str], typer.Option(help="This device; repeat.")] = [],  # noqa: B006
    query: QueryOption = None,
    timeout: TimeoutOption = 300.0,
    wait: Annotated[bool, typer.Option(help="Wait until each is over.")] = False,  # noqa: FBT002
    output: OutputOption = Output.TABLE,
) -> None:
    """Ask several devices to do something: a command for each.

    Of a device that can't, or whose owner does not allow it, the command is refused. With --wait exit code 1 where one
    did not succeed.

    Example: shoal command send restart-runtime --query "site==plant7" --wait
    """
    body = {"kind": kind, "devices": device, "query": query, "timeout_s": timeout}
    with client(context) as api:
        found = api.post("/commands", body)
        if wait:
            found = [_await_end(api, one) for one in found]
        show_rows(found, output, _COLUMNS, empty="")
        if wait and any(one["state"] != "succeeded" for one in found):
            raise typer.Exit(1)


def list_commands(
    context: typer.Context,
    device: Annotated[str | None, typer.Option(help="Only to this device.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only of this kind, such as logs.")] = None,
    state: Annotated[str | None, typer.Option(help="queued, sent, running, succeeded, failed, …")] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """List commands to devices, newest first."""
    with client(context) as api:
        rows = api.items("/commands", device=device, kind=kind, state=state)
        show_rows(rows, output, _COLUMNS, empty="no device was asked for anything yet; see `shoal device --help`")


command.command("list")(list_commands)
command.command("ls", hidden=True)(list_commands)


@command.command("show")
def show(context: typer.Context, command_id: CommandArgument, output: OutputOption = Output.TABLE) -> None:
    """Show a command, and what came of it."""
    with client(context) as api:
        _show(api.get(f"/commands/{segment(command_id)}"), output)


@command.command("logs")
def command_logs(context: typer.Context, command_id: CommandArgument, output: OutputOption = Output.TABLE) -> None:
    """Print the log lines that came of a command, and those to come."""
    with client(context) as api:
        _print_log(api, api.get(f"/commands/{segment(command_id)}"), output)


@command.command("cancel")
def cancel(context: typer.Context, command_id: CommandArgument, output: OutputOption = Output.TABLE) -> None:
    """End a command; what its device has done stays."""
    with client(context) as api:
        _show(api.post(f"/commands/{segment(command_id)}/cancel"), output)


_COLUMNS: list[tuple[str, Any]] = [
    ("id", lambda row: row["id"]),
    ("device", lambda row: row["device_id"]),
    ("kind", lambda row: row["kind"]),
    ("state", lambda row: row["state"]),
    ("why", lambda row: row["detail"] or None),
    ("by", lambda row: row["created_by"]),
    ("at", lambda row: row["created_at"][:16].replace("T", " ")),
]
