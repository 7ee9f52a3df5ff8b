"""Several fleet servers over one database and one broker, each a process that can be killed for real."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import httpx

from tests.fleet import free_port, wait_until
from tests.forked import ForkedServer

TOKEN = "the-admin-of-several-servers"


class Servers:
    """Servers by name, with state folders of their own and what they must share in one.

    Args:
        folder: for all their state.
        database_url: of their database.
        broker_url: of their broker.
        variables: settings of all.
    """

    def __init__(self, folder: Path, database_url: str, broker_url: str, **variables: str) -> None:
        self.folder = folder
        self.ports: dict[str, int] = {}
        self.processes: dict[str, ForkedServer] = {}
        shared = folder / "shared"
        (shared / "artifacts").mkdir(parents=True, exist_ok=True)
        self.artifacts_url = (shared / "artifacts").absolute().as_uri()
        self._variables = {
            "SHOAL_ADMIN_TOKEN": TOKEN,
            "SHOAL_DATABASE_URL": database_url,
            "SHOAL_BROKER_URL": broker_url,
            "SHOAL_ARTIFACTS_URL": self.artifacts_url,
            "SHOAL_TRUST_KEYS": str(shared / "trust"),
            "SHOAL_CONVERSION_WORKERS": "0",
            "SHOAL_DELTAS": "false",
            **variables,
        }

    def start(self, name: str, *, wait: bool = True, **variables: str) -> None:
        port = self.ports.setdefault(name, free_port())
        state = self.folder / name
        shared_ca = {
            f"SHOAL_CA_{kind}": str(self.folder / "first-ca" / file)
            for kind, file in (("CERT", "ca.pem"), ("KEY", "ca.key"))
            if (self.folder / "first-ca" / file).exists()
        }
        environment = {
            "SHOAL_STATE_DIR": str(state),
            "SHOAL_PORT": str(port),
            **self._variables,
            **shared_ca,
            **variables,
        }
        log = self.folder / f"{name}.log"
        self.processes[name] = ForkedServer({**os.environ, **environment}, log)
        if wait:
            wait_until(f"server {name}", lambda: self._alive(name) and self.ready(name), 60)

    def share_ca(self, name: str) -> None:
        """Let further servers have the CA that one made, as an operator copies it."""
        (self.folder / "first-ca").symlink_to(self.folder / name / "ca")

    def _alive(self, name: str) -> bool:
        process = self.processes[name]
        assert process.poll() is None, f"{name} ended with {process.returncode}:\n{self.log(name)[-4000:]}"
        return True

    def ready(self, name: str) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.ports[name]}/readyz", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    def api(self, name: str) -> httpx.Client:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        return httpx.Client(base_url=f"http://127.0.0.1:{self.ports[name]}/api/v1", headers=headers, timeout=60)

    def get(self, path: str, **parameters: Any) -> Any:
        """Of whichever server answers."""
        for name in [*self.processes, *self.processes]:
            try:
                with self.api(name) as api:
                    answer = api.get(path, params=parameters)
            except httpx.TransportError:
                continue
            if answer.status_code < 500:
                assert answer.status_code == 200, answer.text
                return answer.json()
        raise httpx.ConnectError("no server answers")

    def kill(self, name: str) -> None:
        """SIGKILL, as a power cut would."""
        process = self.processes.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def stop(self, name: str, timeout_s: float = 40.0) -> None:
        """In order."""
        process = self.processes.pop(name)
        process.terminate()
        process.wait(timeout_s)

    def stop_all(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(30)
            except Exception:
                process.kill()
                process.wait()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")
