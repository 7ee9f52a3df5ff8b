"""`make bench-ingest`: telemetry samples a second through a broker into either database, beside a bare subscriber.

The bare one takes the same messages by the same client, decodes them, and writes what waits in one transaction, by
executemany or COPY, into one table without a key: it checks nothing, stores twice what comes twice, and answers nobody.
Both take turns in this run, and medians over the rounds count. The broker holds the messages when they begin.
"""

from __future__ import annotations

import argparse
import datetime as dt
import gc
import queue
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import msgspec
import paho.mqtt.client as paho
import psycopg
from paho.mqtt.enums import CallbackAPIVersion
from sqlalchemy import func, select, text

from agent.protocol.codec import decode, encode
from agent.protocol.facts import DeviceFacts
from agent.protocol.histogram import bucket_of
from agent.protocol.messages import HostWindow, ModelWindow, Reported, TelemetryBatch
from agent.protocol.topics import DeviceTopic, device_topic, every_shard_filter
from agent.protocol.version import SPOKEN
from fleet_server import migrations
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.devices.reports import record_reports
from fleet_server.enrolment.service import Authority
from fleet_server.gateway.conduct import Conduct
from fleet_server.gateway.delivery import Delivery
from fleet_server.gateway.handlers import BATCHES, Handlers, is_telemetry
from fleet_server.gateway.inbox import FairInbox, Message
from fleet_server.gateway.mqtt import MqttLink
from fleet_server.gateway.service import GROUP_BYTES
from fleet_server.models import Fleet, HostWindowRow, ModelWindowRow
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.samples.receiving import Receiving
from fleet_server.settings import Settings
from fleet_server.trust.ca import FleetCa
from tests.benchmarks.common import Checks, broker
from tests.databases import postgresql, postgresql_programs

DEVICES = 100
LIMIT_S = 300.0
FACTS = DeviceFacts(
    agent_version="1", os="", kernel="", arch="x86_64", cpu_model="", cpu_cores=1, cpu_features=(), memory_mb=1,
    disk_free_mb=1,
)  # fmt: skip


def batch(spool: str, sequence: int) -> TelemetryBatch:
    """A window of ten seconds in which a model answered 200 requests, of which 20 were labelled."""
    latency = {bucket_of(0.002 * 1.05 ** (number % 40)): 5 for number in range(40)}
    window = ModelWindow(
        "mnist", "1", "a" * 64, "d", "CPUExecutionProvider", 200, 1, 0, 200, latency, ((3, 3, 19), (3, 5, 1))
    )
    now = time.time()
    return TelemetryBatch(
        SPOKEN, spool, sequence, now - 10, now, (window,), HostWindow(12.5, 900.0, 80.0, 51.0, 9000.0)
    )


def send(port: int, spool: str, count: int) -> None:
    """Publish `count` samples of `DEVICES` devices at QoS 1, as fast as the broker takes them."""
    client = paho.Client(CallbackAPIVersion.VERSION2)
    client.max_inflight_messages_set(200)
    client.max_queued_messages_set(0)
    client.connect("127.0.0.1", port)
    client.loop_start()
    for number in range(count):
        payload = encode(batch(spool, number // DEVICES + 1))
        info = client.publish(device_topic(f"dev-{number % DEVICES}", DeviceTopic.TELEMETRY), payload, qos=1)
    info.wait_for_publish(LIMIT_S)
    client.disconnect()
    client.loop_stop()


class Bare:
    """The ceiling: messages to rows, and nothing else."""

    def __init__(self, url: str, folder: Path) -> None:
        self._inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._sqlite: sqlite3.Connection | None = None
        self.stored = 0
        columns = "ended timestamptz, spool text, sequence bigint, model text, requests bigint, latency bytea"
        if url.startswith("sqlite"):
            self._sqlite = sqlite3.connect(folder / "bare.db", check_same_thread=False)
            self._sqlite.execute("PRAGMA journal_mode=WAL")
            self._sqlite.execute("PRAGMA synchronous=NORMAL")
            self._sqlite.execute("CREATE TABLE IF NOT EXISTS bare (ended, spool, sequence, model, requests, latency)")
        else:
            self._postgresql = psycopg.connect(url.replace("+psycopg", ""))
            self._postgresql.execute(f"CREATE TABLE IF NOT EXISTS bare ({columns})")
            self._postgresql.commit()

    def put(self, message: Message) -> None:
        self._inbox.put(message.payload)

    def step(self) -> None:
        try:
            waiting = [self._inbox.get(timeout=0.1)]
        except queue.Empty:
            return
        while len(waiting) < BATCHES and not self._inbox.empty():
            waiting.append(self._inbox.get())
        rows = []
        for one in (decode(payload, TelemetryBatch) for payload in waiting):
            ended = dt.datetime.fromtimestamp(one.ended_at, dt.UTC)
            for model in one.models:
                packed = msgspec.msgpack.encode(model.latency)
                rows.append((ended, one.spool_id, one.sequence, model.model, model.requests, packed))
        self._write(rows)
        self.stored += len(waiting)

    def _write(self, rows: list[tuple[Any, ...]]) -> None:
        if self._sqlite is not None:
            with self._sqlite:
                values = [(str(row[0]), *row[1:]) for row in rows]
                self._sqlite.executemany("INSERT INTO bare VALUES (?, ?, ?, ?, ?, ?)", values)
            return
        with self._postgresql.cursor() as cursor, cursor.copy("COPY bare FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)
        self._postgresql.commit()

    def close(self) -> None:
        (self._sqlite or self._postgresql).close()


class Server:
    """The server's own path: inbox, handlers, ingest, acknowledgements."""

    def __init__(self, database: Database, folder: Path) -> None:
        authority = Authority(FleetCa.open(folder / "ca", DEFAULT_FLEET), dt.timedelta(days=1), 10)
        store = ArtifactStore.open(None, folder=folder)
        delivery = Delivery(store, lambda *_: False, None)
        receiving = Receiving(database, store.below("samples"), folder)
        self.dropped, self.acknowledged, self.stored, self.groups = 0, 0, 0, 0
        self._inbox = FairInbox(self._drop)
        self.put = self._inbox.put
        self.publish: Callable[[str, bytes], bool] = lambda *_: False
        conduct = Conduct(database)
        self._handlers = Handlers(database, Settings(), delivery, authority, conduct, receiving, self._answer)

    def _drop(self, _device: str) -> None:
        self.dropped += 1

    def _answer(self, topic: str, payload: bytes) -> bool:
        self.acknowledged += 1
        return self.publish(topic, payload)

    def step(self) -> None:
        message = self._inbox.get(0.1)
        if message is not None:
            more = self._inbox.get_more(is_telemetry, limit=BATCHES - 1, limit_bytes=GROUP_BYTES)
            self._handlers.handle_telemetry([message, *more])
            self.stored += 1 + len(more)
            self.groups += 1


@contextmanager
def listening(port: int, name: str, put: Callable[[Message], None]) -> Iterator[MqttLink]:
    link = MqttLink(f"mqtt://127.0.0.1:{port}", name, [every_shard_filter(DeviceTopic.TELEMETRY)], put)
    link.start()
    end = time.monotonic() + 30
    while not link.connected and time.monotonic() < end:
        time.sleep(0.002)
    try:
        yield link
    finally:
        link.stop()


def timed(one: Bare | Server, port: int, spool: str, count: int) -> float:
    """Samples a second, from connecting to a broker that holds all of them to the last one stored.

    They are sent before: what is measured is not how fast this machine sends.
    """
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            one.step()

    one.stored = 0
    with listening(port, spool, one.put):
        time.sleep(0.5)  # the subscription; the broker keeps a session from here on
    subprocess.run([sys.executable, __file__, "--send", str(port), spool, str(count)], check=True)
    thread = threading.Thread(target=work)
    thread.start()
    started = time.perf_counter()
    with listening(port, spool, one.put) as link:
        if isinstance(one, Server):
            one.publish = link.publish
        while one.stored < count and time.perf_counter() - started < LIMIT_S:
            time.sleep(0.002)
        took = time.perf_counter() - started
        stop.set()
        thread.join()
    if one.stored < count:
        raise RuntimeError(f"{count - one.stored} of {count} samples did not come")
    return count / took


def measure(checks: Checks, name: str, url: str, folder: Path, port: int, *, count: int, rounds: int) -> None:
    migrations.upgrade(url)
    database = Database(url)
    with database.write() as session:
        if session.get(Fleet, DEFAULT_FLEET) is None:
            session.add(Fleet(id=DEFAULT_FLEET))
        session.flush()
        hello = Reported(protocol=SPOKEN, boot_id="b", sequence=1, revision=0, facts=FACTS)
        record_reports(session, {f"dev-{number}": hello for number in range(DEVICES)}, utc_now())
    bare, rates = Bare(url, folder), {"bare": [], "ours": []}  # type: ignore[var-annotated]
    groups = acknowledged = 0
    for number in range(rounds):
        rates["bare"].append(timed(bare, port, f"{name}-bare-{number}", count))
        server = Server(database, folder / f"{name}-{number}")
        rates["ours"].append(timed(server, port, f"{name}-{number}", count))
        groups += server.groups
        acknowledged += server.acknowledged
        if server.dropped:
            raise RuntimeError(f"{server.dropped} samples were dropped as beyond a device's share")
    bare.close()
    with database.read() as session:
        windows = session.scalar(select(func.count()).select_from(ModelWindowRow)) or 0
        hosts = session.scalar(select(func.count()).select_from(HostWindowRow)) or 0
        size = session.scalar(text(_SIZE[database.is_sqlite])) or 0
    database.dispose()
    ours, ceiling = statistics.median(rates["ours"]), statistics.median(rates["bare"])
    checks.report(f"{name}: samples a second, bare subscriber", ceiling)
    checks.report(f"{name}: samples a second, stored once and acknowledged", ours)
    checks.at_least(f"{name}: of the bare subscriber's rate", ours / ceiling, 0.6)
    checks.at_least(f"{name}: samples stored, of those sent", min(windows, hosts) / (rounds * count), 1.0)
    checks.at_most(f"{name}: rows, of samples sent", max(windows, hosts) / (rounds * count), 1.0)
    checks.report(f"{name}: samples a transaction", rounds * count / groups)
    checks.report(f"{name}: samples an acknowledgement", rounds * count / acknowledged)
    checks.report(f"{name}: bytes a sample, indexes included", size / (rounds * count))


_SIZE = {
    True: "SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()",
    False: "SELECT pg_total_relation_size('model_windows') + pg_total_relation_size('host_windows') + "
    "pg_total_relation_size('telemetry_batches') + pg_total_relation_size('telemetry_groups')",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--send", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.send:
        port, spool, count = given.send
        send(int(port), spool, int(count))
        return
    size = {"count": 1000, "rounds": 1} if given.short else {"count": 20_000, "rounds": 3}
    checks = Checks("ingest")
    gc.collect()
    gc.freeze()  # as `shoal-server` does when it has started
    with tempfile.TemporaryDirectory(prefix="shoal-ingest-") as name:
        folder = Path(name)
        with broker(folder) as (port, _):
            measure(checks, "SQLite", f"sqlite:///{folder / 'shoal.db'}", folder, port, **size)
            if postgresql_programs():
                with postgresql() as url:
                    measure(checks, "PostgreSQL", url, folder, port, **size)
    checks.print()


if __name__ == "__main__":
    main()
