"""What systemd is told, by a socket as it makes one."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.sd_notify import ServiceManager


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        yield sock


def heard(sock: socket.socket) -> list[str]:
    found = []
    while True:
        try:
            found.append(sock.recv(4096).decode())
        except BlockingIOError:
            return found


def test_it_says_that_it_is_ready_and_that_it_ends_where_nobody_wants_a_sign_of_life(systemd: socket.socket) -> None:
    manager = ServiceManager({"NOTIFY_SOCKET": systemd.getsockname()})
    manager.ready()
    manager.alive()
    manager.stopping()
    assert heard(systemd) == ["READY=1", "STOPPING=1"]


def test_it_says_that_it_lives_four_times_a_deadline_however_often_its_loop_comes_round(systemd: socket.socket) -> None:
    clock = Clock()
    manager = ServiceManager({"NOTIFY_SOCKET": systemd.getsockname(), "WATCHDOG_USEC": "60000000"}, clock)
    for _ in range(600):
        manager.alive()
        clock.now += 0.1
    assert heard(systemd) == ["WATCHDOG=1"] * 4
    clock.now += 3600.0
    assert heard(systemd) == [], "a loop that does not come round says nothing"


@pytest.mark.parametrize("told", ["", "soon", "-1", "0", "٣"])
def test_a_deadline_that_is_none_asks_for_no_sign_of_life(systemd: socket.socket, told: str) -> None:
    ServiceManager({"NOTIFY_SOCKET": systemd.getsockname(), "WATCHDOG_USEC": told}).alive()
    assert heard(systemd) == []


def test_only_the_process_that_is_watched_says_that_it_lives(systemd: socket.socket) -> None:
    told = {"NOTIFY_SOCKET": systemd.getsockname(), "WATCHDOG_USEC": "1000000"}
    ServiceManager({**told, "WATCHDOG_PID": "1"}).alive()
    assert heard(systemd) == []
    ServiceManager({**told, "WATCHDOG_PID": str(os.getpid())}).alive()
    assert heard(systemd) == ["WATCHDOG=1"]


def test_a_name_in_the_abstract_namespace_is_reached() -> None:
    name = f"shoal-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name)
        ServiceManager({"NOTIFY_SOCKET": "@" + name}).ready()
        assert sock.recv(64) == b"READY=1"


@pytest.mark.parametrize("name", ["", "/nowhere/notify", "vsock:2:1234", "relative"])
def test_without_a_manager_a_daemon_works_on(name: str) -> None:
    manager = ServiceManager({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "1000000"})
    manager.ready()
    manager.alive()
    manager.stopping()
