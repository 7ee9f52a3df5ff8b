"""What keeps a broker's files up to date beside it, in the compose file and the chart: against a real server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fleet import LocalFleet, wait_until

ROOT = Path(__file__).resolve().parents[2]
KEEPER = ROOT / "deploy" / "images" / "broker-keeper"
BROKER = """
import signal
signal.signal(signal.SIGHUP, lambda *_: print("read again", flush=True))
while True:
    signal.pause()
"""


@pytest.mark.slow  # `shoal` starts three times
def test_a_broker_learns_of_devices_and_a_single_run_writes_once(tmp_path: Path) -> None:
    fleet = LocalFleet(tmp_path, tls=True)
    target = tmp_path / f"br{os.getpid()}"  # the kernel keeps 15 letters of a process's name
    target.symlink_to(sys.executable)
    log = tmp_path / "broker.log"
    with log.open("wb") as output:
        broker = subprocess.Popen([str(target), "-c", BROKER], stdout=output)
    keeper = None
    try:
        fleet.start_server()
        environment = {**os.environ, "SHOAL_URL": fleet.url, "SHOAL_TOKEN": fleet.token, "PYTHONPATH": str(ROOT)}
        environment["SHOAL_CA_FILE"] = str(fleet.ca_file)
        command = [sys.executable, str(KEEPER), "mosquitto", str(tmp_path / "mosquitto"), "mqtt.example", "127.0.0.1"]
        subprocess.run(command, env=environment, check=True, timeout=60, capture_output=True)
        assert {path.name for path in (tmp_path / "mosquitto").iterdir()} == {
            *("mosquitto.conf", "acl", "ca.pem", "crl.pem", "server.pem", "server.key"),
        }
        keeper = subprocess.Popen(
            [sys.executable, str(KEEPER), "nats", str(tmp_path / "nats"), "mqtt.example"],
            env={**environment, "BROKER_PROCESS": target.name, "BROKER_LOOK_S": "0.2"},
            stderr=subprocess.DEVNULL,
        )
        wait_until("the broker to be told", lambda: log.read_text().count("read again") == 1)
        configuration = tmp_path / "nats" / "nats.conf"
        assert "CN=camera-1" not in configuration.read_text()
        assert fleet.enroll("camera-1").returncode == 0
        wait_until("the broker to be told again", lambda: log.read_text().count("read again") == 2)
        assert "CN=camera-1,O=default" in configuration.read_text()
    finally:
        for process in (keeper, broker):
            if process is not None:
                process.kill()
                process.wait()
        fleet.stop()
