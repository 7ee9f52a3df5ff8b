"""The screens of `shoal top`, by Textual. What they show is read by whoever makes them, in a thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from rich.console import RenderableType
from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.screen import Screen
from textual.widgets import DataTable, Footer, Static

from fleet_server.cli.fleet_picture import DeviceLine, FleetPicture
from fleet_server.sdk import ApiError

DEVICE_COLUMNS = ("device", "profile", "serves", "requests/s", "errors", "p95 ms", "trouble")
VERSION_COLUMNS = ("version", "devices", "requests", "errors", "p50 ms", "p95 ms")


class DeviceScreen(Screen[None]):  # type: ignore[misc]  # its types are not looked at: it is an extra
    """One device, read again and again.

    Args:
        read: gives what is shown; may raise `ApiError`.
        every_s: seconds between two looks.
    """

    BINDINGS: ClassVar = [Binding("escape,q", "app.pop_screen", "back")]

    def __init__(self, read: Callable[[], RenderableType], every_s: float) -> None:
        super().__init__()
        self._read, self._every_s = read, every_s

    def compose(self) -> ComposeResult:
        """Its parts."""
        with VerticalScroll():
            yield Static("reading…", id="device")
        yield Footer()

    def on_mount(self) -> None:
        """Begin to look."""
        self.look()
        self.set_interval(self._every_s, self.look)

    def look(self) -> None:
        """Read in a thread, and show it."""
        self.run_worker(self._look, thread=True, exclusive=True)

    def _look(self) -> None:
        try:
            found = self._read()
        except ApiError as error:
            found = f"{error.detail}; it is tried again"
        self.app.call_from_thread(self._show, found)

    def _show(self, found: RenderableType) -> None:
        if self.is_attached:
            self.query_one("#device", Static).update(found)


class FleetApp(App[None]):  # type: ignore[misc]  # as above
    """The fleet.

    Args:
        read: gives the fleet; may raise `ApiError`.
        read_device: gives what is shown of one device.
        every_s: seconds between two looks.
    """

    TITLE = "shoal top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #summary { height: auto; padding: 0 1; text-style: bold; }
    #said { height: auto; padding: 0 1; color: $text-muted; }
    #versions { height: auto; max-height: 30%; margin-bottom: 1; }
    #devices { height: 1fr; }
    """
    BINDINGS: ClassVar = [
        Binding("q", "quit", "quit"),
        Binding("r", "look", "look now"),
        Binding("t", "trouble", "only those in trouble"),
    ]

    def __init__(
        self,
        read: Callable[[], FleetPicture],
        read_device: Callable[[str], RenderableType],
        every_s: float,
    ) -> None:
        super().__init__()
        self._read_fleet, self._read_device, self._every_s = read, read_device, every_s
        self._picture = FleetPicture()
        self._only_trouble = False

    def compose(self) -> ComposeResult:
        """Its parts."""
        yield Static("reading…", id="summary", markup=False)
        yield Static("", id="said", markup=False)
        yield DataTable(id="versions", show_cursor=False)
        yield DataTable(id="devices", cursor_type="row")
        yield Footer()

    def on_mount(self) -> None:
        """Begin to look."""
        self.query_one("#versions", DataTable).add_columns(*VERSION_COLUMNS)
        self.query_one("#devices", DataTable).add_columns(*DEVICE_COLUMNS)
        self.query_one("#devices", DataTable).focus()
        self.look()
        self.set_interval(self._every_s, self.look)

    def action_look(self) -> None:
        """Look now."""
        self.look()

    def action_trouble(self) -> None:
        """Show all devices, or those in trouble alone."""
        self._only_trouble = not self._only_trouble
        self._show(self._picture)

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Show a device by itself."""
        if event.data_table.id == "devices" and event.row_key.value is not None:
            device_id = str(event.row_key.value)
            self.push_screen(DeviceScreen(lambda: self._read_device(device_id), self._every_s))

    def look(self) -> None:
        """Read the fleet in a thread, and show it; while nobody answers, what was read before stays."""
        self.run_worker(self._look, thread=True, exclusive=True)

    def _look(self) -> None:
        try:
            found = self._read_fleet()
        except ApiError as error:
            self.call_from_thread(self._say, f"{error.detail}; it is tried again")
            return
        self.call_from_thread(self._show, found)

    def _say(self, text: str) -> None:
        self.screen_stack[0].query_one("#said", Static).update(text)

    def _show(self, found: FleetPicture) -> None:
        """What is selected stays so, wherever its row is now."""
        self._picture = found
        base = self.screen_stack[0]
        base.query_one("#summary", Static).update(found.summary)
        self._say("; ".join((f"the {found.window_s:g} s before {found.at:%H:%M:%S} UTC", *found.rollouts)))
        versions = base.query_one("#versions", DataTable)
        versions.clear()
        for one in found.versions:
            numbers = (one.devices, one.requests, one.errors, _ms(one.p50_ms), _ms(one.p95_ms))
            versions.add_row(*_texts(one.name, *numbers))
        table = base.query_one("#devices", DataTable)
        selected = _selected(table)
        table.clear()
        shown = [one for one in found.devices if one.trouble or not self._only_trouble]
        for line in shown:
            table.add_row(*_texts(*_cells(line)), key=line.id)
        if selected in {line.id for line in shown}:
            table.move_cursor(row=table.get_row_index(selected), animate=False)


def _selected(table: DataTable[Text]) -> str:
    if not table.row_count:
        return ""
    return str(table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value)


def _cells(line: DeviceLine) -> tuple[str, ...]:
    return (
        line.id,
        line.profile or "–",
        line.serves or "–",
        f"{line.per_s:.1f}",
        str(line.errors),
        _ms(line.p95_ms),
        line.trouble or "–",
    )


def _texts(*cells: object) -> list[Text]:
    """As they are: a text that came from a device is no markup."""
    return [Text(str(one)) for one in cells]


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
