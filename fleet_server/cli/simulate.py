"""`shoal simulate`: a fleet of simulated devices on this machine."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar

from fleet_server.cli.output import Output, OutputOption, errors, fail, rows_table, show_object, show_rows

if TYPE_CHECKING:
    from fleet_server.simulator.behaviours import Behaviours
    from fleet_server.simulator.identities import Identities
    from fleet_server.simulator.runner import Counts

LOOK_S = 1.0
SAY_S = 10.0
ORDINARY = {"raspberry-pi-5": 1.0}


def simulate(
    broker: Annotated[
        str, typer.Option(help="The fleet's broker, mqtt://host:port or mqtts://…; a cluster's by commas.")
    ] = "mqtt://127.0.0.1:7471",
    devices: Annotated[int, typer.Option("-n", "--devices", help="How many.", min=1, max=100_000)] = 200,
    behaviours: Annotated[
        Path | None, typer.Option("-f", "--behaviours", help="YAML or JSON that says how they behave.")
    ] = None,
    profile_mix: Annotated[
        str | None,
        typer.Option(help="Ordinary devices of shipped profiles, without a file: raspberry-pi-5=3,x86-64-vnni=1."),
    ] = None,
    faults: Annotated[
        str | None,
        typer.Option(
            help="Shares of devices that are slow, slow-link, flaky, offline, lying-clock, reboots or errors: "
            "flaky=0.1,slow=0.05."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is left to chance.", min=0)] = 0,
    first: Annotated[int, typer.Option(help="Number of the first; other processes have others.", min=0)] = 0,
    prefix: Annotated[str, typer.Option(help="Their ids begin with it.")] = "sim",
    interval: Annotated[
        float | None, typer.Option(help="Seconds of a telemetry window. Default: what the server says.", min=0.1)
    ] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds until it ends by itself.", min=0)] = None,
    connect_rate: Annotated[float, typer.Option(help="Connections a second that are begun.", min=0.1)] = 200.0,
    qos: Annotated[
        int, typer.Option(help="At which devices subscribe: 0 for NATS, as agents do there.", min=0, max=1)
    ] = 1,
    source: Annotated[
        str | None, typer.Option(help="Local address to connect from: one has ports for 28,000 connections.")
    ] = None,
    identities: Annotated[
        Path | None, typer.Option(help="Folder of the devices' certificates, for a broker by TLS.")
    ] = None,
    enroll: Annotated[
        str | None, typer.Option(help="Enrolment token for those that have no certificate there yet.")
    ] = None,
    server: Annotated[
        str, typer.Option(envvar="SHOAL_URL", help="Where they enrol; plain HTTP on this machine.")
    ] = "http://127.0.0.1:7470",
    ca_file: Annotated[
        Path | None, typer.Option(envvar="SHOAL_CA_FILE", help="PEM that an https:// server is checked by.")
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Simulate many devices, until Ctrl-C.

    They speak the real protocol to a real broker and server. These must take devices without certificates
    (SHOAL_BROKER_TLS=false, `shoal up --insecure`), or the devices enrol first (--identities, --enroll). Models are
    not run: how devices answer is drawn.

    Example: shoal simulate --devices 2000 --profile-mix raspberry-pi-5=3,x86-64-vnni=1 --faults flaky=0.05
    """
    from fleet_server.simulator.behaviours import BehavioursError
    from fleet_server.simulator.identities import Identities, IdentitiesError
    from fleet_server.simulator.population import populate
    from fleet_server.simulator.runner import Simulation, SimulationError

    stopping = threading.Event()
    try:
        wanted = _behaviours(behaviours, profile_mix, faults)
        population = populate(wanted, devices, seed, first=first, prefix=prefix)
        logging.getLogger("agent.commands").setLevel(logging.ERROR)  # each of thousands of devices would tell of each
        held = None if identities is None else Identities(identities)
        if enroll is not None:
            _enrol(held, [one.device_id for one in population], server, enroll, ca_file)
        simulation = Simulation(
            broker,
            population,
            wanted.effects,
            seed=seed,
            interval_s=interval,
            connect_per_s=connect_rate,
            qos=qos,
            source=source,
            identities=held,
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda _number, _frame: stopping.set())
        with simulation:
            _follow(simulation.counts, stopping, duration)
        ended = simulation.stop()
    except BehavioursError as error:
        raise fail(f"{behaviours}: {error}" if behaviours else str(error), 2) from None
    except (SimulationError, IdentitiesError) as error:
        raise fail(str(error)) from None
    _summary(ended, output)
    if ended.sent == 0:
        raise fail(f"no device reached the broker at {broker}: {ended.problem or 'it ended too soon'}")


def _enrol(held: Identities | None, device_ids: Sequence[str], server: str, token: str, ca_file: Path | None) -> None:
    """Get certificates for those that have none; says how far it is every thousand."""
    from agent.enrolment import Request

    if held is None:
        raise fail("--enroll: say where certificates are kept: --identities FOLDER", 2)

    def told(done: int, of: int) -> None:
        if done % 1000 == 0 or done == of:
            errors.print(f"{done} of {of} devices enrolled")

    held.enrol(device_ids, Request(server, token, ca_file=str(ca_file or "")), told)


def _behaviours(file: Path | None, mix: str | None, faults: str | None) -> Behaviours:
    from fleet_server.simulator.behaviours import BehavioursError, of_profiles, read
    from fleet_server.simulator.presets import with_faults

    if file is not None and mix is not None:
        raise BehavioursError("give either --behaviours or --profile-mix: a file says which profiles there are")
    if file is not None:
        try:
            found = read(file.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise BehavioursError(f"it can't be read: {error}") from None
    else:
        found = of_profiles(ORDINARY if mix is None else _shares(mix, "--profile-mix"))
    return with_faults(found, _shares(faults, "--faults") if faults else {})


def _shares(text: str, option: str) -> dict[str, float]:
    """`a=0.3,b=0.7` as numbers by name."""
    from fleet_server.simulator.behaviours import BehavioursError

    found = {}
    for part in text.split(","):
        name, equals, share = part.strip().partition("=")
        try:
            found[name] = float(share) if equals else 1.0
        except ValueError:
            raise BehavioursError(f"{option}: {part!r} is not name=share, such as flaky=0.1") from None
    return found


def _follow(counts: Any, stopping: threading.Event, duration: float | None) -> None:
    """Show how it goes: live on a terminal, else a line now and then."""
    begun, said_at = time.monotonic(), 0.0
    with Live(console=errors, transient=True, auto_refresh=False) as live:
        while not stopping.is_set():
            found: Counts = counts()
            now = time.monotonic()
            if errors.is_terminal:
                live.update(_picture(found), refresh=True)
            elif now - said_at >= SAY_S:
                said_at = now
                errors.print(_line(found))
            left = LOOK_S if duration is None else min(LOOK_S, begun + duration - now)
            if left <= 0:
                return
            stopping.wait(left)


def _line(found: Counts) -> str:
    problem = f"; last problem: {found.problem}" if found.problem else ""
    return (
        f"{found.connected} of {found.devices} devices connected, {found.sent} messages sent, {found.received} "
        f"received, {found.acknowledged} of {found.windows} telemetry windows stored{problem}"
    )


def _picture(found: Counts) -> RenderableType:
    parts: list[RenderableType] = [
        _line(found).replace("[", "\\["),
        ProgressBar(total=max(found.devices, 1), completed=found.connected, width=60),
    ]
    rows = _phases(found)
    if rows:
        parts.append(rows_table(rows, PHASE_COLUMNS))
    return Group(*parts)


def _phases(found: Counts) -> list[dict[str, Any]]:
    return [
        {"version": version, "phase": phase.value, "devices": count}
        for version, phases in found.phases.items()
        for phase, count in sorted(phases.items())
    ]


PHASE_COLUMNS: Sequence[Any] = [
    ("version", lambda row: row["version"]),
    ("phase", lambda row: row["phase"]),
    ("devices", lambda row: row["devices"]),
]


def _summary(ended: Counts, output: Output) -> None:
    import msgspec

    found: dict[str, Any] = msgspec.to_builtins(ended)
    if output is Output.JSON:
        show_object(found, output)
        return
    del found["phases"], found["activations"]
    show_object(found, output)
    show_rows(_phases(ended), output, PHASE_COLUMNS, empty="the server wanted nothing of them")
