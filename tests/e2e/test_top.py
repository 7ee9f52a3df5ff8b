"""`shoal top` against a real server with a real agent, driven by Textual's own pilot."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from fleet_server.cli import top
from fleet_server.cli.fleet_picture import read_fleet
from fleet_server.cli.main import app as command_line
from fleet_server.sdk import Client
from tests.cli import CliRunner
from tests.fleet import LocalFleet, wait_until

pytest.importorskip("textual")

from textual.widgets import DataTable, Static

from fleet_server.cli.top_app import FleetApp


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"))
    try:
        fleet.start_server()
        for device in ("cam-1", "cam-2"):
            fleet.start_agent(device)
        for device in ("cam-1", "cam-2"):
            wait_until("the device", lambda device=device: fleet.api.get(f"/devices/{device}").status_code == 200)
        fleet.kill("cam-2")
        wait_until("its absence", lambda: not fleet.get("/devices/cam-2")["online"])
        yield fleet
    finally:
        fleet.stop()


@pytest.fixture
def api(fleet: LocalFleet) -> Iterator[Client]:
    with Client(fleet.url, fleet.token) as found:
        yield found


def application(api: Client) -> FleetApp:
    return FleetApp(
        lambda: read_fleet(api, query=None, window_s=60.0),
        lambda device: top.picture(top.snapshot(api, device, 60.0)),
        0.5,
    )


def driven(app: FleetApp, play: Callable[[Any], Awaitable[None]]) -> None:
    async def run() -> None:
        async with app.run_test(size=(120, 30)) as pilot:
            await play(pilot)

    asyncio.run(run())


async def until(pilot: Any, condition: Callable[[], bool]) -> None:
    for _ in range(200):
        if condition():
            return
        await pilot.pause(0.1)
    raise AssertionError("it did not come so far in 20 s")


def rows(app: FleetApp, table: str = "devices") -> list[list[str]]:
    found = app.screen_stack[0].query_one(f"#{table}", DataTable)
    return [[str(cell) for cell in found.get_row_at(number)] for number in range(found.row_count)]


def test_a_fleet_is_shown_those_in_trouble_first_and_alone(api: Client) -> None:
    app = application(api)

    async def play(pilot: Any) -> None:
        await until(pilot, lambda: len(rows(app)) == 2)
        assert [row[0] for row in rows(app)] == ["cam-2", "cam-1"]
        assert rows(app)[0][-1] == "offline"
        assert "2 devices, 1 online, 1 in trouble" in str(app.query_one("#summary", Static).render())
        await pilot.press("down")
        await pilot.press("r")
        await pilot.pause(1.0)
        table = app.query_one("#devices", DataTable)
        assert table.cursor_row == 1, "what was selected stays so"
        await pilot.press("t")
        await until(pilot, lambda: [row[0] for row in rows(app)] == ["cam-2"])
        await pilot.press("t")
        await until(pilot, lambda: len(rows(app)) == 2)

    driven(app, play)


def test_enter_shows_a_device_and_escape_goes_back(api: Client) -> None:
    app = application(api)

    async def play(pilot: Any) -> None:
        await until(pilot, lambda: len(rows(app)) == 2)
        await pilot.press("down", "enter")
        await until(pilot, lambda: len(app.screen_stack) == 2)

        def shown() -> str:
            from rich.console import Console

            console = Console(width=100)
            with console.capture() as capture:
                console.print(app.screen.query_one("#device", Static).content)
            return capture.get()

        await until(pilot, lambda: "cam-1" in shown())
        assert "online" in shown()
        assert "it serves nothing" in shown()
        await pilot.press("escape")
        await until(pilot, lambda: len(app.screen_stack) == 1)
        await pilot.press("q")

    driven(app, play)


def test_while_the_server_is_away_what_was_read_stays(fleet: LocalFleet, api: Client) -> None:
    app = application(api)

    async def play(pilot: Any) -> None:
        await until(pilot, lambda: len(rows(app)) == 2)
        await asyncio.to_thread(fleet.kill, "server")
        await until(pilot, lambda: "tried again" in str(app.query_one("#said", Static).render()))
        assert len(rows(app)) == 2
        await asyncio.to_thread(fleet.start_server)
        await until(pilot, lambda: "UTC" in str(app.query_one("#said", Static).render()))

    driven(app, play)


def test_what_is_wrong_is_said_before_the_screen_is_taken(fleet: LocalFleet) -> None:
    environment = {"SHOAL_URL": fleet.url, "SHOAL_TOKEN": fleet.token}
    done = CliRunner().invoke(command_line, ["top", "--query", "id=="], env=environment)
    assert done.exit_code == 1
    assert "query" in done.stderr
