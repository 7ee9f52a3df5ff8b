"""Three NATS nodes with JetStream and MQTT as a cluster on loopback, any of which can be killed and started again."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import httpx

from tests.fleet import free_port, wait_until

NODES = 3
CONFIGURATION = """\
server_name: n{number}
listen: "127.0.0.1:{client}"
http: "127.0.0.1:{monitor}"
max_payload: 2MB
jetstream {{ store_dir: "{store}" }}
cluster {{
  name: shoal
  listen: "127.0.0.1:{route}"
  routes: [{routes}]
}}
mqtt {{
  listen: "127.0.0.1:{mqtt}"
  max_ack_pending: 200
  {mqtt_options}
}}
"""


class NatsCluster:
    """Nodes by number, each with a log and its files below `folder`.

    Args:
        executable: nats-server.
        folder: for all of them.
        mqtt_options: further lines of their `mqtt` block.
    """

    def __init__(self, executable: str, folder: Path, mqtt_options: str = "") -> None:
        self._executable, self._folder, self._options = executable, folder, mqtt_options
        self._ports = [[free_port() for _ in range(4)] for _ in range(NODES)]
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    @property
    def urls(self) -> list[str]:
        """Where each speaks MQTT."""
        return [f"mqtt://127.0.0.1:{ports[2]}" for ports in self._ports]

    def start(self, number: int) -> None:
        client, monitor, mqtt, route = self._ports[number]
        routes = ", ".join(f'"nats://127.0.0.1:{ports[3]}"' for ports in self._ports)
        config = self._folder / f"n{number}.conf"
        config.write_text(
            CONFIGURATION.format(
                number=number, client=client, monitor=monitor, mqtt=mqtt, route=route, routes=routes,
                store=self._folder / f"n{number}", mqtt_options=self._options,
            )
        )  # fmt: skip
        with (self._folder / f"n{number}.log").open("ab") as log:
            self._processes[number] = subprocess.Popen(
                [self._executable, "-c", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "GOMAXPROCS": "2"},
            )

    def healthy(self, number: int) -> bool:
        """Whether a node says that it can work: with JetStream, and with what it has caught up."""
        try:
            return httpx.get(f"http://127.0.0.1:{self._ports[number][1]}/healthz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def start_all(self) -> None:
        for number in range(NODES):
            self.start(number)
        for number in range(NODES):
            wait_until(f"NATS node {number}", lambda number=number: self.healthy(number), 60)  # type: ignore[misc]

    def kill(self, number: int) -> None:
        """SIGKILL, as a power cut would."""
        process = self._processes.pop(number)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()
