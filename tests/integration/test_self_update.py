"""An agent becomes another release of itself, and is back when that one is bad; real processes, and a broker."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from agent.launcher import pointer
from agent.protocol.errors import WireErrorCode
from agent.protocol.lifecycle import Phase
from fleet_server.gateway.broker import find_mosquitto
from tests.fleet import free_port, wait_until
from tests.processes import descendants
from tests.self_updating import BAD, SPOILS, Bundles, Client, Device, settled


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a Mosquitto that takes everybody."""
    port, folder = free_port(), tmp_path_factory.mktemp("broker")
    (folder / "conf").write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\n")
    executable, environment = find_mosquitto("mosquitto")
    process = subprocess.Popen(
        [str(executable), "-c", str(folder / "conf")], env=dict(environment), stderr=subprocess.DEVNULL
    )
    yield port
    process.terminate()
    process.wait()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    return Bundles(tmp_path_factory.mktemp("bundles"))


def test_an_agent_becomes_the_next_release_and_nobody_is_refused(tmp_path: Path, broker: int, bundles: Bundles) -> None:
    device = Device(tmp_path / "dev-1", broker, bundles.good)
    device.start()
    try:
        wait_until("an answer", device.serves)
        client = Client(device)
        settled(device, Phase.ACTIVE)
        wait_until("the new worker alone", lambda: device.version() == "9.0.0")
        seen = client.stop()
        assert pointer(str(device.state / "agent"), "current") == f"releases/{device.release.digest}"
        assert seen.bodies == {str(device.ask().json()["outputs"])}
        assert (seen.refused, seen.cut, seen.other) == (0, 0, 0), seen
        assert seen.answers > 10
        pid = device.process.pid if device.process else 0
        wait_until("the old worker's end", lambda: len(descendants(pid, "plain_asyncio")) == 1)
        assert device.stop() == 0
        device.start()  # without a trial the launcher is the agent itself
        wait_until("an answer", device.serves)
        assert device.version() == "9.0.0"
        assert not descendants(device.process.pid, "agent.main")
    finally:
        device.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone makes a PID namespace everywhere")
def test_the_first_process_of_a_container_becomes_releases_too(tmp_path: Path, broker: int, bundles: Bundles) -> None:
    good = Device(tmp_path / "good", broker, bundles.good, contained=True)
    bad = Device(tmp_path / "bad", broker, bundles.bad("ends", *BAD["crashes"]), contained=True)
    try:
        for device in (good, bad):
            device.start()
        for device in (good, bad):
            wait_until("an answer", device.serves)
        clients = [Client(device) for device in (good, bad)]
        settled(good, Phase.ACTIVE)
        wait_until("the new worker alone", lambda: good.version() == "9.0.0")
        failure = settled(bad, Phase.ROLLED_BACK).failure
        assert failure is not None
        assert failure.detail == "it ended with 3 2 times"
        assert bad.version() == "0.1.0"
        for seen in [client.stop() for client in clients]:
            assert (seen.refused, seen.other) == (0, 0), seen
        assert [device.stop() for device in (good, bad)] == [0, 0], good.log.read_text() + bad.log.read_text()
        good.start()
        wait_until("an answer", good.serves)
        assert good.version() == "9.0.0"
        assert good.stop() == 0
    finally:
        for device in (good, bad):
            device.kill()


def test_systemd_sees_a_sign_of_life_while_a_release_that_hangs_is_tried(
    tmp_path: Path, broker: int, bundles: Bundles
) -> None:
    device = Device(tmp_path / "dev-1", broker, bundles.bad("silent", *BAD["hangs"]), confirm_s=6)
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        device.environment |= {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "2000000"}
        device.start()
        try:
            wait_until("the trial's start", lambda: starts(device) == 1)
            time.sleep(1)  # what was there before has said its last
            signs(systemd)
            time.sleep(4)
            assert len(signs(systemd)) > 3, "one is due each half second"
            assert pointer(str(device.state / "agent"), "next") is not None
            failure = settled(device, Phase.ROLLED_BACK).failure
            assert failure is not None
            assert failure.detail == REASONS["hangs"]
        finally:
            device.kill()


def signs(systemd: socket.socket) -> list[bytes]:
    """Of life, that lie in a socket."""
    found = []
    with suppress(BlockingIOError):
        while True:
            found.append(systemd.recv(4096))
    return [one for one in found if one == b"WATCHDOG=1"]


REASONS = {
    "crashes": "it ended with 3 2 times",
    "hangs": "it did not prove itself within 6 s: it says nothing",
    "never connects": "it did not prove itself within 6 s: it has no connection to the broker",
    "its worker does not come up": (
        "it did not prove itself within 6 s: its inference worker is not ready, or loads still"
    ),
    "spoils": "it ended with 5 2 times",
}


@pytest.mark.parametrize(
    "kinds", [("spoils",), pytest.param(tuple(REASONS), marks=pytest.mark.slow)], ids=["one", "all"]
)
def test_bad_releases_are_taken_back_with_a_reason_and_what_served_goes_on(
    kinds: tuple[str, ...], tmp_path: Path, broker: int, bundles: Bundles
) -> None:
    bad = {**BAD, "spoils": ("agent/main.py", SPOILS)}
    devices = {
        kind: Device(tmp_path / kind.replace(" ", "-"), broker, bundles.bad(kind, *bad[kind]), confirm_s=6)
        for kind in kinds
    }
    clients = {}
    try:
        for kind, device in devices.items():
            device.start()
            wait_until("an answer", device.serves)
            clients[kind] = Client(device)
        reasons = {}
        for kind, device in devices.items():
            failure = settled(device, Phase.ROLLED_BACK, 90).failure
            assert failure is not None
            assert failure.code is WireErrorCode.RELEASE_FAILED
            reasons[kind] = failure.detail
        seen = {kind: client.stop() for kind, client in clients.items()}
        assert reasons == {kind: REASONS[kind] for kind in kinds}
        for kind, device in devices.items():
            folder = str(device.state / "agent")
            assert pointer(folder, "next") is None
            assert pointer(folder, "current") is None
            assert device.version() == "0.1.0"
            assert seen[kind].bodies == {str(device.ask().json()["outputs"])}
            assert (seen[kind].refused, seen[kind].other) == (0, 0), (kind, seen[kind])
            assert device.stop() == 0, device.log.read_text()
            assert "damaged" not in device.log.read_text()
    finally:
        for device in devices.values():
            device.kill()


def starts(device: Device) -> int:
    try:
        return int(json.loads((device.state / "agent" / "trial.json").read_text())["starts"])
    except FileNotFoundError:
        return 0


@pytest.mark.slow
def test_an_agent_killed_on_trial_is_tried_again_and_not_without_end(
    tmp_path: Path, broker: int, bundles: Bundles
) -> None:
    bad, good = bundles.bad("waits", *BAD["hangs"]), bundles.good
    devices = [Device(tmp_path / "good", broker, good, most_starts=3), Device(tmp_path / "bad", broker, bad)]
    try:
        for device in devices:
            device.start()
        for device in devices:
            folder = str(device.state / "agent")
            wait_until("the trial", lambda: pointer(folder, "next"))  # noqa: B023 (called at once)
            device.kill()
        for device in devices:
            device.start()
        settled(devices[0], Phase.ACTIVE)
        wait_until("its only agent", lambda: devices[0].version() == "9.0.0")
        wait_until("the trial's next start", lambda: starts(devices[1]) == 2)
        devices[1].kill()
        devices[1].start()
        failure = settled(devices[1], Phase.ROLLED_BACK).failure
        assert failure is not None
        assert "2 times" in failure.detail
        wait_until("an answer", devices[1].serves)
        assert devices[1].version() == "0.1.0"
        devices[1].kill()  # it is not tried by itself again
        devices[1].start()
        wait_until("an answer", devices[1].serves)
        assert settled(devices[1], Phase.ROLLED_BACK)
        assert pointer(str(devices[1].state / "agent"), "next") is None
    finally:
        for device in devices:
            device.kill()


@pytest.mark.slow
def test_a_device_whose_owner_does_not_want_it_does_not_update_itself(
    tmp_path: Path, broker: int, bundles: Bundles
) -> None:
    device = Device(tmp_path / "dev", broker, bundles.good, settings='self_update = "off"\n')
    device.start()
    try:
        record = settled(device, Phase.FAILED)
        assert record.failure is not None
        assert record.failure.code is WireErrorCode.RELEASE_UNFIT
        assert "self_update" in record.failure.detail
    finally:
        device.kill()
