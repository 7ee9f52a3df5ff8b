"""`shoal`: the command line. It talks to the REST API only; `shoal server run` and `shoal up` start it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.main import get_command

from fleet_server.cli.access import fleet, login, logout, token, user, whoami
from fleet_server.cli.admin import admin
from fleet_server.cli.agent_releases import agent_release
from fleet_server.cli.alerts import alert
from fleet_server.cli.broker import broker
from fleet_server.cli.bundles import bundle
from fleet_server.cli.commands import command
from fleet_server.cli.convert import convert
from fleet_server.cli.devices import device
from fleet_server.cli.export import export
from fleet_server.cli.gates import gate
from fleet_server.cli.infer import infer
from fleet_server.cli.models import model, variant
from fleet_server.cli.profiles import profile
from fleet_server.cli.rollouts import audit, rollout
from fleet_server.cli.samples import sample
from fleet_server.cli.simulate import simulate
from fleet_server.cli.telemetry import telemetry
from fleet_server.cli.top import fleet_top
from fleet_server.cli.tracing import traced
from fleet_server.cli.trust import trust
from fleet_server.cli.webhooks import webhook
from fleet_server.cli.worker import worker

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=(
        "Convert a model for every kind of device, prove it there, roll it out, watch it.\n\n"
        "Try it on this machine with `shoal up`. On the way from a model to devices: `shoal profile create`, "
        "`shoal model push`, `shoal variant build`, `shoal gate run`, `shoal rollout create`, "
        "`shoal telemetry models`.\n\n"
        "Exit codes: 0 ok, 1 failed, 2 wrong usage, 3 not authenticated or not allowed, 4 not found, 5 conflict."
    ),
)
server = typer.Typer(no_args_is_help=True, help="The fleet server on this machine.")
for name, group in (
    ("device", device),
    ("broker", broker),
    ("profile", profile),
    ("model", model),
    ("variant", variant),
    ("gate", gate),
    ("rollout", rollout),
    ("bundle", bundle),
    ("agent-release", agent_release),
    ("telemetry", telemetry),
    ("command", command),
    ("sample", sample),
    ("fleet", fleet),
    ("user", user),
    ("token", token),
    ("trust", trust),
    ("alert", alert),
    ("webhook", webhook),
    ("audit", audit),
    ("server", server),
    ("admin", admin),
):
    app.add_typer(group, name=name)


@app.callback()
def connection(
    context: typer.Context,
    url: Annotated[str, typer.Option(envvar="SHOAL_URL", help="The fleet server's address.")] = "http://127.0.0.1:7470",
    bearer: Annotated[
        str | None, typer.Option("--token", envvar="SHOAL_TOKEN", help="Your token. Default: that of `shoal login`.")
    ] = None,
    in_fleet: Annotated[
        str | None, typer.Option("--fleet", envvar="SHOAL_FLEET", help="The fleet to act in, where you may in several.")
    ] = None,
    ca_file: Annotated[
        Path | None, typer.Option(envvar="SHOAL_CA_FILE", help="Certificates (PEM) that an https:// one is checked by.")
    ] = None,
) -> None:
    """Exit codes: 0 ok, 1 failed, 2 wrong usage, 3 not authenticated or not allowed, 4 not found, 5 conflict."""
    context.obj = {"url": url, "token": bearer, "fleet": in_fleet, "ca_file": ca_file}


@app.command()
def version() -> None:
    """Print the version."""
    from agent import __version__

    typer.echo(f"shoal {__version__}")


for one in (login, logout, whoami):
    app.command(one.__name__)(one)
app.command("convert")(convert)
app.command("export")(export)
app.command("infer")(infer)
app.command("worker")(worker)
app.command("simulate")(simulate)
app.command("top")(fleet_top)


@server.command("run")
def run_server(
    state_dir: Annotated[
        Path | None, typer.Option(help="Folder for database, artifacts and working files. Default: /var/lib/shoal.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; beyond loopback a token is needed. Default: 127.0.0.1.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port of the REST API. Default: 7470.")] = None,
    broker_url: Annotated[
        str | None, typer.Option(help="An external broker: mqtt://host:port. Default: an embedded one.")
    ] = None,
    broker_port: Annotated[int | None, typer.Option(help="Port of the embedded broker. Default: 7471.")] = None,
    database_url: Annotated[str | None, typer.Option(help="postgresql+psycopg://…; SQLite when absent.")] = None,
    log_format: Annotated[str | None, typer.Option(help="The log as text, or as json. Default: text.")] = None,
) -> None:
    """Run the fleet server until Ctrl-C.

    Every option, and more settings (docs/operations.md), can be given as a SHOAL_<NAME> variable.
    """
    from fleet_server.cli.server_main import run

    given: dict[str, Any] = {
        "state_dir": state_dir,
        "host": host,
        "port": port,
        "broker_url": broker_url,
        "broker_port": broker_port,
        "database_url": database_url,
        "log_format": log_format,
    }
    raise typer.Exit(run({key: value for key, value in given.items() if value is not None}))


@app.command()
def up(
    agents: Annotated[int, typer.Option(help="How many agents to start.", min=0, max=50)] = 3,
    state: Annotated[Path, typer.Option(help="Folder for everything they keep.")] = Path(".shoal"),
    port: Annotated[
        int, typer.Option(help="Port of the REST API; the broker takes the next, agents those from +100.")
    ] = 7470,
    insecure: Annotated[  # noqa: FBT002
        bool, typer.Option("--insecure", help="A broker that takes everybody, instead of certificates.")
    ] = False,
) -> None:
    """Run a server, its broker and some agents on this machine until Ctrl-C.

    The agents are enrolled: they and the broker prove themselves by certificates of a CA that is made in the folder.
    """
    from fleet_server.cli.up import run_all

    raise typer.Exit(run_all(agents=agents, state=state, port=port, insecure=insecure))


def main() -> None:
    """The console script."""
    with traced(sys.argv[1:], lambda: get_command(app)):
        app()


if __name__ == "__main__":
    main()
