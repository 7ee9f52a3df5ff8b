"""`make bench-device-list`: processor time of one page of the list of devices (50), in fleets of 10,000 and 100,000.

A server's HTTP side runs as a process of its own, as `shoal-server` runs it, and is asked over one connection that
stays open. What counts is the processor time of that process; what backends of PostgreSQL take is told beside it.
Next to it, in this process, what the raw driver takes: the same statement, its rows fetched, and JSON made of them.
Fleets and ways take turns, and medians over the rounds count.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import msgspec

from fleet_server import migrations
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.models import Fleet
from fleet_server.principals import DEFAULT_FLEET
from tests.benchmarks.common import Checks, await_port, children, cpu_s
from tests.big_fleet import Builder, Loader
from tests.databases import postgresql, postgresql_programs
from tests.fleet import free_port

TOKEN = "the-admin-of-the-benchmark"
PATH = "/api/v1/devices?limit=50"
LONG_WAY = "/api/v1/devices?limit=50&created_since=2020-01-01T00:00:00Z"  # a filter that the short way leaves alone
RATIO = 1.64  # 0.45 ms where the raw driver takes 0.25 to 0.30
GROWTH = 1.1


@dataclass(frozen=True)
class Size:
    """How much is done."""

    fleets: tuple[int, ...]
    rounds: int
    requests: int


LONG = Size((10_000, 100_000), 7, 200)
SHORT = Size((100, 200), 2, 20)


class Client:
    """One connection that stays open, and is made anew where the server ended it because nothing was asked."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.connect()

    def connect(self) -> None:
        self._sock = socket.create_connection(("127.0.0.1", self._port))
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _more(self) -> bytes:
        got = self._sock.recv(1 << 18)
        if not got:
            raise ConnectionError("the server ended the connection")
        return got

    def ask(self, path: str) -> bytes:
        """The body of an answer.

        Raises:
            RuntimeError: when it is another than 200.
        """
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
        self._sock.sendall(head.encode())
        got = b""
        while (end := got.find(b"\r\n\r\n")) < 0:
            got += self._more()
        fields = got[:end].lower()
        if b" 200 " not in fields[:20]:
            raise RuntimeError(f"{path}: {got[:400]!r}")
        left = int(fields.partition(b"content-length:")[2].partition(b"\r\n")[0]) - (len(got) - end - 4)
        body = [got[end + 4 :]]
        while left > 0:
            body.append(self._more())
            left -= len(body[-1])
        return b"".join(body)

    def close(self) -> None:
        self._sock.close()


@dataclass
class Standing:
    """A fleet in a database, a server over it, and what was measured, in ms of processor time."""

    devices: int
    database: Database
    client: Client
    server: int
    backends: Callable[[], float]
    bytes: int = 0
    times: dict[str, list[float]] = field(default_factory=dict)

    def note(self, name: str, ms: float) -> None:
        self.times.setdefault(name, []).append(ms)

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])


def fill(database: Database, devices: int) -> None:
    """Profiles and devices, as a large fleet's are."""
    with database.write() as session:
        if session.get(Fleet, DEFAULT_FLEET) is None:
            session.add(Fleet(id=DEFAULT_FLEET))
    loader = Loader(database)
    builder = Builder(loader, devices, utc_now().replace(microsecond=0))
    with loader.without_indices():
        builder.catalog()
        builder.devices()
    loader.finish()


@contextmanager
def standing(name: str, url: str, devices: int) -> Iterator[Standing]:
    migrations.upgrade(url)
    database = Database(url)
    fill(database, devices)
    port = free_port()
    process = subprocess.Popen([sys.executable, __file__, "--serve", url, str(port)])
    try:
        await_port(port, process, 60)
        client = Client(port)
        postmaster = 0 if name == "SQLite" else _postmaster(database)
        yield Standing(devices, database, client, process.pid, lambda: _backends(postmaster))
        client.close()
    finally:
        process.terminate()
        process.wait(20)
        database.dispose()


def _postmaster(database: Database) -> int:
    with database.driver() as connection:
        backend = connection.execute("SELECT pg_backend_pid()").fetchone()[0]
    return int(Path(f"/proc/{backend}/stat").read_text().rpartition(")")[2].split()[1])


def _backends(postmaster: int) -> float:
    return sum(cpu_s(pid) for pid in children(postmaster)) if postmaster else 0.0


def serve(url: str, port: int) -> None:
    """The HTTP side of a server, until it is ended."""
    import gc

    import uvicorn

    from fleet_server.app import create_app
    from fleet_server.settings import Settings

    app = create_app(Settings(admin_token=TOKEN, request_rate=1e6, request_burst=10**6))
    app.state.database, app.state.admin_token = Database(url), TOKEN
    gc.collect()
    gc.freeze()
    uvicorn.run(app, host="127.0.0.1", port=port, log_config=None, access_log=False, server_header=False)


JSON_COLUMNS = frozenset({"tags", "facts", "serving", "problems", "reported_deployments", "hold"})
COLUMNS = (
    "d.id, p.name, d.profile_pinned, d.online, {last_seen_at}, {created_at}, {tags}, {facts}, {serving}, {problems}, "
    "{reported_deployments}, {hold}, d.desired_revision, d.reported_revision"
)
ROWS = (
    "SELECT {columns} FROM devices d LEFT JOIN profiles p ON p.id = d.profile_id "
    "WHERE d.fleet_id = ? AND d.forgotten_at IS NULL ORDER BY d.id ASC LIMIT ?"
)


def statement(database: Database) -> str:
    """What a page is read by with the raw driver: no objects are made of times and of JSON columns."""
    times = {name: f"d.{name}" for name in ("last_seen_at", "created_at")}
    texts = {name: f"d.{name}" for name in JSON_COLUMNS}
    if database.is_sqlite:
        return ROWS.format(columns=COLUMNS.format(**times, **texts))
    times = {name: f"to_char({it} AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US')" for name, it in times.items()}
    texts = {name: f"{it}::text AS {name}" for name, it in texts.items()}
    return ROWS.format(columns=COLUMNS.format(**times, **texts)).replace("?", "%s")


def bare(one: Standing) -> bytes:
    """What the driver itself takes: the statement, its rows, and JSON of the columns."""
    with one.database.driver() as connection:
        cursor = connection.execute(statement(one.database), [DEFAULT_FLEET, 51])
        names, rows = [column[0] for column in cursor.description], cursor.fetchall()
    raw = {number for number, name in enumerate(names) if name in JSON_COLUMNS}
    return msgspec.json.encode(
        [
            {
                name: msgspec.Raw(value.encode()) if number in raw and value is not None else value
                for number, (name, value) in enumerate(zip(names, row, strict=True))
            }
            for row in rows
        ]
    )


def measure(one: Standing, size: Size) -> None:
    """One round."""
    for name, path, requests in (("short", PATH, size.requests), ("long", LONG_WAY, size.requests // 10)):
        one.client.close()
        one.client.connect()
        for _ in range(3):
            one.bytes = len(one.client.ask(path))
        began, behind = cpu_s(one.server), one.backends()
        for _ in range(requests):
            one.client.ask(path)
        one.note(name, (cpu_s(one.server) - began) * 1000 / requests)
        one.note(f"{name} backends", (one.backends() - behind) * 1000 / requests)
    bare(one)
    began = time.process_time()
    for _ in range(size.requests):
        bare(one)
    one.note("bare", (time.process_time() - began) * 1000 / size.requests)


def report(checks: Checks, name: str, fleets: list[Standing]) -> None:
    for one in fleets:
        label = f"{name}, {one.devices}"
        ours, driver = one.median("short"), one.median("bare")
        checks.report(f"{label}: raw driver and JSON, CPU ms", driver)
        checks.report(f"{label}: page of 50, CPU ms of the server", ours)
        checks.at_most(f"{label}: page of 50, by the raw driver's", ours / driver, RATIO)
        checks.report(f"{label}: the same by FastAPI and the ORM, CPU ms", one.median("long"))
        if name != "SQLite":
            checks.report(f"{label}: page of 50, CPU ms of PostgreSQL beside it", one.median("short backends"))
        checks.report(f"{label}: bytes of the page", one.bytes)
    small, large = fleets[0].median("short"), fleets[-1].median("short")
    checks.at_most(f"{name}: CPU of the large fleet by the small one's", large / small, GROWTH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", choices=["SQLite", "PostgreSQL"])
    parser.add_argument("--devices", type=int, action="append", help="sizes of fleets in the place of both")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve[0], int(given.serve[1]))
        return
    size = SHORT if given.short else LONG
    if given.devices:
        size = Size(tuple(given.devices), size.rounds, size.requests)
    checks = Checks("device_list")
    for name in ("SQLite", "PostgreSQL"):
        if given.only not in {None, name} or (name == "PostgreSQL" and not postgresql_programs()):
            continue
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-device-list-")))
            fleets = []
            for devices in size.fleets:
                url = f"sqlite:///{folder / f'{devices}.db'}" if name == "SQLite" else stack.enter_context(postgresql())
                fleets.append(stack.enter_context(standing(name, url, devices)))
            for _ in range(size.rounds):
                for one in fleets:
                    measure(one, size)
            report(checks, name, fleets)
    checks.print()


if __name__ == "__main__":
    main()
