"""`shoal up`: a server, its broker and some agents as child processes of one command."""

from __future__ import annotations

import os
import shlex
import signal
import time
from pathlib import Path

from fleet_server.cli.output import errors
from fleet_server.sdk.errors import ApiError, LocalError
from fleet_server.sdk.local import LocalFleet


def run_all(*, agents: int, state: Path, port: int, insecure: bool = False) -> int:
    """Start everything, wait for Ctrl-C or the end of one, stop everything.

    Args:
        agents: how many.
        state: folder for what they keep.
        port: of the REST API; the others follow from it.
        insecure: let the broker take everybody instead of enrolling the agents for certificates.

    Returns:
        0 after Ctrl-C, 1 when a process ended by itself, or did not start.
    """
    fleet = LocalFleet(state, port=port, broker_port=port + 1, insecure=insecure)
    stopping: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda got, _: stopping.append(got))
    fleet.start_server()
    errors.print(f"REST API [bold]{fleet.url}[/] (docs at /docs), broker {fleet.broker}")
    failed = ""
    try:
        _start_agents(fleet, agents, port, stopping)
        given = (
            "$SHOAL_ADMIN_TOKEN"
            if "SHOAL_ADMIN_TOKEN" in os.environ
            else f"$(cat {shlex.quote(str(fleet.admin_token_file))})"
        )
        errors.print(f"to use it: export SHOAL_URL={fleet.url} SHOAL_TOKEN={given}", soft_wrap=True, markup=False)
        errors.print(f"logs are in {fleet.logs}; Ctrl-C stops all")
        while not stopping and not failed:
            time.sleep(0.2)
            failed = fleet.failed()
        if failed:
            errors.print(f"[red]{failed} ended by itself[/]; its log is {fleet.logs / failed}.log")
    except (LocalError, ApiError) as error:
        failed = error.detail
        errors.print(f"[red]error:[/] {error.detail}", markup=True)
    finally:
        fleet.stop()
    return 1 if failed else 0


def _start_agents(fleet: LocalFleet, agents: int, port: int, stopping: list[int]) -> None:
    token = fleet.wait_for_token(stop=lambda: bool(stopping))
    addresses = [(f"agent-{index}", f"127.0.0.1:{port + 100 + index}") for index in range(1, agents + 1)]
    if stopping:
        return
    fleet.start_agents(addresses, token)
    for name, listen in addresses:
        errors.print(f"{name} serves at http://{listen}/v2")
