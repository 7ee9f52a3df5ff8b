"""The daemon's command line. `agent.main` begins it."""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
from pathlib import Path

from agent import __version__
from agent.config import load_config
from agent.errors import AgentError
from agent.head_start import Spawned
from agent.protocol.logs import log_to_stderr
from agent.releases.handover import Inherited

TOKEN_VARIABLE = "SHOAL_AGENT_TOKEN"  # noqa: S105 (a name, no secret)


def run(spawned: Spawned | None, inherited: Inherited) -> None:
    """Do what the command line says.

    Args:
        spawned: a worker's process, for the daemon; None where it is to start one itself.
        inherited: what the version before handed over.
    """
    options = _parser().parse_args()
    try:
        commands = {"facts": _facts, "enroll": _enroll, "bundle": _bundle}
        command = commands.get(options.command)
        if command is None:
            sys.exit(_run(options, spawned, inherited))
        gc.enable()
        sys.exit(command(options))
    except AgentError as error:
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shoal-agent",
        description="Runs on a device: gets models from the fleet server over MQTT and serves them on a local API.",
        epilog="Without a file it uses mqtt://127.0.0.1:7471 and serves at 127.0.0.1:8470; docs/operations.md lists "
        "every key. Example: shoal-agent run --config /etc/shoal-agent.toml",
    )
    parser.add_argument("--version", action="version", version=f"shoal-agent {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    run = commands.add_parser(
        "run",
        help="run the daemon (the default)",
        description="Run the daemon until Ctrl-C or SIGTERM.",
        epilog="Example: SHOAL_AGENT_BROKER=mqtt://10.0.0.5:1883 shoal-agent run",
    )
    facts = commands.add_parser(
        "facts",
        help="print what is measured of this machine",
        description="Print what is measured of this machine: what a profile's `match` can name.",
        epilog="Example: shoal-agent facts -o json",
    )
    facts.add_argument("-o", "--output", choices=("table", "json"), default="table", help="how to print")
    enroll = commands.add_parser(
        "enroll",
        help="get this device's certificate from a fleet server",
        description="Make this device's key and get its certificate from a fleet server. Without a token it waits "
        "until somebody approves the device there.",
        epilog="Example: shoal-agent enroll --server https://fleet.example:7470 --token shoal1.…",
    )
    enroll.add_argument("--server", required=True, metavar="URL", help="https://host:port of the fleet server")
    enroll.add_argument("--token", default="", help="enrolment token; SHOAL_AGENT_TOKEN keeps it out of process lists")
    enroll.add_argument("--ca-pin", default="", metavar="SHA256", help="the CA's pin, where no token carries it")
    enroll.add_argument("--ca-file", default="", metavar="FILE", help="check the server against these certificates")
    enroll.add_argument("--new-key", action="store_true", help="make another key, such as after a lockout")
    enroll.add_argument("--wait", type=float, default=3600.0, metavar="S", help="how long to wait for approval")
    bundle = commands.add_parser("bundle", help="take models from a bundle, where no network reaches")
    actions = bundle.add_subparsers(dest="action", metavar="action", required=True)
    imported = actions.add_parser(
        "import",
        help="copy a bundle into the state folder",
        description="Copy a bundle (shoal bundle export) into the state folder, of its artifacts those of this "
        "device's profile. The running agent checks its signatures, and uses it.",
        epilog="Example: shoal-agent bundle import /media/stick/line-a.shoal-bundle --config /etc/shoal-agent.toml",
    )
    imported.add_argument("file", type=Path, metavar="FILE", help="the bundle")
    for one in (parser, run, facts, enroll, imported):
        one.add_argument(
            "--config",
            metavar="FILE",
            type=Path,
            default=None if one is parser else argparse.SUPPRESS,
            help="configuration file (TOML); SHOAL_AGENT_<KEY> variables win over it",
        )
    return parser


def _run(options: argparse.Namespace, spawned: Spawned | None, inherited: Inherited) -> int:
    from agent.resuming import resume

    config = load_config(options.config, os.environ)
    log_to_stderr(config.log_level, config.log_format, device=config.device_id)
    resumed = resume(config, spawned, inherited)
    from agent.sd_notify import ServiceManager
    from agent.supervisor import Supervisor  # what it imports takes longer than to have the models served

    supervisor = Supervisor(config, resumed)
    gc.freeze()
    gc.enable()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: supervisor.stop())
    supervisor.run(ServiceManager(os.environ))
    supervisor.become_next()
    return 0


def _enroll(options: argparse.Namespace) -> int:
    from agent.enrolment import Request, enroll

    config = load_config(options.config, {key: value for key, value in os.environ.items() if key != TOKEN_VARIABLE})
    token = options.token or os.environ.get(TOKEN_VARIABLE, "")
    request = Request(options.server, token, options.ca_pin, options.ca_file, options.new_key, options.wait)
    enroll(config, request, lambda text: print(text, flush=True))  # noqa: T201
    return 0


def _bundle(options: argparse.Namespace) -> int:
    from agent.bundle_import import import_bundle

    target, count = import_bundle(load_config(options.config, os.environ), options.file)
    print(f"{target} holds {count} artifacts; the agent looks for it every few seconds")  # noqa: T201
    return 0


def _facts(options: argparse.Namespace) -> int:
    import msgspec

    from agent.hardware import measure

    config = load_config(options.config, {"SHOAL_AGENT_STATE_DIR": "/tmp", **os.environ})  # noqa: S108 (only measured)
    facts = measure(config.state_dir, tags=config.tags, runtimes=config.runtimes)
    if options.output == "json":
        print(msgspec.json.format(msgspec.json.encode(facts)).decode())  # noqa: T201
        return 0
    for name, value in msgspec.to_builtins(facts).items():
        print(f"{name:<14} {value}")  # noqa: T201
    return 0
