"""`shoal up`: a server, its broker and some agents as child processes of one command."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from fleet_server.access.bootstrap import FILE as ADMIN_TOKEN_FILE
from fleet_server.children import die_with_parent
from fleet_server.cli.output import errors
from fleet_server.sdk import ApiError, Client, UnreachableError

STOP_S = 15.0


def run_all(*, agents: int, state: Path, port: int, insecure: bool = False) -> int:
    """Start everything, wait for Ctrl-C or the end of one, stop everything.

    Args:
        agents: how many.
        state: folder for what they keep.
        port: of the REST API; the others follow from it.
        insecure: let the broker take everybody instead of enrolling the agents for certificates.

    Returns:
        0 after Ctrl-C, 1 when a process ended by itself.
    """
    state = state.absolute()
    (state / "logs").mkdir(parents=True, exist_ok=True)
    settings = {
        "SHOAL_STATE_DIR": str(state / "server"),
        "SHOAL_PORT": str(port),
        "SHOAL_BROKER_PORT": str(port + 1),
        "SHOAL_BROKER_TLS": "false" if insecure else "true",
    }
    admin = state / "server" / ADMIN_TOKEN_FILE
    stopping: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda got, _: stopping.append(got))
    children = {"server": _start(state, "server", ["-m", "fleet_server.cli.server_main"], settings)}
    broker = f"{'mqtt' if insecure else 'mqtts'}://127.0.0.1:{port + 1}"
    errors.print(f"REST API [bold]http://127.0.0.1:{port}[/] (docs at /docs), broker {broker}")
    token = ""
    if not insecure:
        token = _enrolment_token(f"http://127.0.0.1:{port}", admin, children["server"], stopping, agents)
    for index in range(1, agents + 1):
        name, listen = f"agent-{index}", f"127.0.0.1:{port + 100 + index}"
        variables = {
            "SHOAL_AGENT_DEVICE_ID": name,
            "SHOAL_AGENT_STATE_DIR": str(state / name),
            "SHOAL_AGENT_BROKER": broker,
            "SHOAL_AGENT_LISTEN": listen,
        }
        if token and not (state / name / "identity" / "identity.json").exists():
            options = ["-m", "agent.main", "enroll", "--server", f"http://127.0.0.1:{port}"]
            _start(state, name, options, {**variables, "SHOAL_AGENT_TOKEN": token}).wait()
        children[name] = _start(state, name, ["-m", "agent.main", "run"], variables)
        errors.print(f"{name} serves at http://{listen}/v2")
    given = "$SHOAL_ADMIN_TOKEN" if "SHOAL_ADMIN_TOKEN" in os.environ else f"$(cat {shlex.quote(str(admin))})"
    errors.print(
        f"to use it: export SHOAL_URL=http://127.0.0.1:{port} SHOAL_TOKEN={given}", soft_wrap=True, markup=False
    )
    errors.print(f"logs are in {state / 'logs'}; Ctrl-C stops all")
    failed = ""
    while not stopping and not failed:
        time.sleep(0.2)
        failed = next((name for name, child in children.items() if child.poll() is not None), "")
    if failed:
        errors.print(f"[red]{failed} ended by itself[/]; its log is {state / 'logs' / failed}.log")
    for child in reversed(children.values()):
        child.terminate()
    deadline = time.monotonic() + STOP_S
    for child in children.values():
        try:
            child.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    return 1 if failed else 0


def _enrolment_token(url: str, admin: Path, server: subprocess.Popen[bytes], stopping: list[int], agents: int) -> str:
    """Wait for the server, and get a token for the agents; empty when it ended, or was ended, before."""
    while not stopping and server.poll() is None:
        given = os.environ.get("SHOAL_ADMIN_TOKEN")
        try:
            with Client(url, given or admin.read_text().strip(), timeout_s=5) as api:
                wanted = {"uses": max(agents, 1), "ttl_s": 600}
                return str(api.post("/enrolment-tokens", wanted)["token"])
        except (UnreachableError, FileNotFoundError):
            time.sleep(0.2)
        except ApiError as error:
            errors.print(f"[red]error:[/] {error.detail}; the agents can't enrol")
            return ""
    return ""


def _start(state: Path, name: str, arguments: list[str], variables: dict[str, str]) -> subprocess.Popen[bytes]:
    with (state / "logs" / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **variables},
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 (one C call, made before exec)
        )
