"""A server, its broker and agents as child processes on this machine: what `shoal up` and `Shoal.local()` start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fleet_server.children import die_with_parent, last_words
from fleet_server.sdk.client import Client
from fleet_server.sdk.errors import LocalError, UnreachableError

STOP_S = 15.0
START_S = 120.0
ADMIN_TOKEN_FILE = "admin-token"  # noqa: S105 (a file's name; fleet_server.access.bootstrap makes it)


def free_port() -> int:
    """A TCP port of loopback that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class LocalFleet:
    """Processes of one fleet, which end when they are told to, or with the process that started them.

    Args:
        state: folder for all they keep; made when absent. Logs are in `logs` below it.
        port: of the REST API.
        broker_port: of the embedded broker.
        insecure: let the broker take everybody instead of enrolling the agents for certificates.
        settings: more of the server's variables.
    """

    def __init__(
        self,
        state: Path,
        *,
        port: int,
        broker_port: int,
        insecure: bool = False,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.state = state.absolute()
        self.logs = self.state / "logs"
        self.url = f"http://127.0.0.1:{port}"
        self.broker = f"{'mqtt' if insecure else 'mqtts'}://127.0.0.1:{broker_port}"
        self.admin_token_file = self.state / "server" / ADMIN_TOKEN_FILE
        self._insecure = insecure
        self._settings = {
            "SHOAL_STATE_DIR": str(self.state / "server"),
            "SHOAL_PORT": str(port),
            "SHOAL_BROKER_PORT": str(broker_port),
            "SHOAL_BROKER_TLS": "false" if insecure else "true",
            **(settings or {}),
        }
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start_server(self) -> None:
        """Start it; it does not answer yet."""
        self.logs.mkdir(parents=True, exist_ok=True)
        self._children["server"] = self._start("server", ["-m", "fleet_server.cli.server_main"], self._settings)

    def wait_for_token(self, *, stop: Callable[[], bool] = lambda: False, seconds: float = START_S) -> str:
        """The admin's token, once the server answers; empty where `stop` said so before.

        Raises:
            LocalError: when the server ends, or does not answer in time.
        """
        deadline = time.monotonic() + seconds
        while not stop():
            if self.failed() or time.monotonic() > deadline:
                log = self.logs / "server.log"
                raise LocalError(f"the server does not start: {last_words(log, 500)}; its log is {log}")
            try:
                token = os.environ.get("SHOAL_ADMIN_TOKEN") or self.admin_token_file.read_text().strip()
                with Client(self.url, token, timeout_s=5) as api:
                    api.get("/devices", limit=1)
            except (UnreachableError, OSError):  # there is no token yet, or no server
                time.sleep(0.2)
            else:
                return token
        return ""

    def start_agents(self, addresses: Sequence[tuple[str, str]], token: str) -> None:
        """Enrol agents that are new here, and start all.

        Args:
            addresses: of each its name, and the address of its local inference API.
            token: the admin's; enrolment tokens are asked for with it.

        Raises:
            LocalError: when one can't be enrolled.
        """
        for name, listen in addresses:
            variables = {
                "SHOAL_AGENT_DEVICE_ID": name,
                "SHOAL_AGENT_STATE_DIR": str(self.state / name),
                "SHOAL_AGENT_BROKER": self.broker,
                "SHOAL_AGENT_LISTEN": listen,
            }
            if not self._insecure and not (self.state / name / "identity" / "identity.json").exists():
                with Client(self.url, token) as api:
                    given = str(api.post("/enrolment-tokens", {"uses": 1, "ttl_s": 600})["token"])
                options = ["-m", "agent.main", "enroll", "--server", self.url]
                if self._start(name, options, {**variables, "SHOAL_AGENT_TOKEN": given}).wait():
                    log = self.logs / f"{name}.log"
                    raise LocalError(f"{name} could not enrol: {last_words(log, 500)}; its log is {log}")
            self._children[name] = self._start(name, ["-m", "agent.main", "run"], variables)

    def failed(self) -> str:
        """The name of a process that ended by itself; empty while all run."""
        return next((name for name, child in self._children.items() if child.poll() is not None), "")

    def stop(self) -> None:
        """End all: agents first, asked politely, then not."""
        for child in reversed(self._children.values()):
            child.terminate()
        deadline = time.monotonic() + STOP_S
        for child in self._children.values():
            try:
                child.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._children.clear()

    def _start(self, name: str, arguments: list[str], variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with (self.logs / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **variables},
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509 (one C call, made before exec)
            )
