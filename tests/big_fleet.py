"""A fleet as large as is asked for, written into a database with what a server keeps of it after a month.

Models with versions, variants, rollouts and deployments; devices of the profiles that come with Shoal, with what can be
asked of them; telemetry as the keeper leaves it: windows of the last minute, hours of the last day, days before that.
Rows go past the ORM, by COPY or prepared statements, and indices are made after them: a fleet of 100,000 is minutes.
"""

from __future__ import annotations

import datetime as dt
import json
import random
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import psycopg
from psycopg import sql
from sqlalchemy import JSON

from agent.protocol.histogram import bucket_of
from fleet_server.clock import utc_now
from fleet_server.db import Base, Database, UtcDateTime, new_id
from fleet_server.devices import shipped
from fleet_server.devices.attributes import attributes_of
from fleet_server.devices.schemas import ProfileCreate
from fleet_server.models import (
    AuditEvent,
    Deployment,
    Device,
    DeviceAttribute,
    DeviceIdentity,
    Enrolment,
    Fleet,
    FleetSnapshot,
    GateRun,
    HostWindowRow,
    Model,
    ModelWindowRow,
    Profile,
    Rollout,
    SampleRequestRow,
    SampleUpload,
    TelemetryFleetTotal,
    TelemetryGroup,
    TelemetryRollup,
    TelemetrySeries,
    Variant,
    Version,
    Webhook,
    WebhookDelivery,
)
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.simulator.facts import of_profile
from fleet_server.telemetry.sketches import pack_latency
from fleet_server.telemetry.totals import DAY_S, FLEET_S, HOUR_S, period_of

MODELS = ("defects", "meters", "faces", "pallets", "noise", "plates")
VERSIONS = 8  # of each model
KEPT = 3  # versions of a model that a device had
HOURS, DAYS = 24, 30  # telemetry_hours_days of 1, and a month
WINDOWS, WINDOW_S, ROLLED_UP = 6, 10, 4  # windows of a series, and how many of them are in hours
GROUP = 1000  # windows of a group
FEATURES = {
    "x86_64": ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni"),
    "aarch64": ("fp", "asimd", "fphp", "asimdhp", "asimddp", "atomics"),
}
SPEC = {"match": {}, "runtime": "onnx"}


class Loader:
    """Writes many rows past the ORM. Columns that are not named have their default; nothing else is checked."""

    def __init__(self, database: Database) -> None:
        raw = database.engine.raw_connection()
        self._raw, self._driver = raw, raw.driver_connection
        self._sqlite = isinstance(self._driver, sqlite3.Connection)
        for statement in (
            ("PRAGMA foreign_keys=OFF", "BEGIN IMMEDIATE")
            if self._sqlite
            else ("SET session_replication_role=replica",)
        ):
            self._driver.execute(statement)  # type: ignore[union-attr]

    def insert(self, table: type[Base], columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Insert rows, of each the values of `columns` in order."""
        name, rest = table.__tablename__, _defaults(table, columns)
        columns = [*columns, *rest]
        converted = self._converted(table, columns, ((*row, *rest.values()) for row in rows))
        if isinstance(self._driver, psycopg.Connection):
            statement = sql.SQL("COPY {} ({}) FROM STDIN").format(
                sql.Identifier(name), sql.SQL(", ").join(map(sql.Identifier, columns))
            )
            with self._driver.cursor() as cursor, cursor.copy(statement) as copy:
                for row in converted:
                    copy.write_row(row)
            return
        names, marks = ", ".join(f'"{one}"' for one in columns), ", ".join("?" * len(columns))
        self._driver.executemany(f"INSERT INTO {name} ({names}) VALUES ({marks})", converted)  # type: ignore[union-attr]

    def _converted(
        self, table: type[Base], columns: Sequence[str], rows: Iterable[Sequence[Any]]
    ) -> Iterable[Sequence[Any]]:
        """What drivers take no value of as it is: JSON, and times in SQLite."""
        kinds = [table.__table__.columns[name].type for name in columns]
        odd = [
            at
            for at, kind in enumerate(kinds)
            if isinstance(kind, JSON) or (self._sqlite and isinstance(kind, UtcDateTime))
        ]
        if not odd:
            yield from rows
            return
        for row in rows:
            plain = list(row)
            for at in odd:
                plain[at] = _plain(plain[at])
            yield plain

    @contextmanager
    def without_indices(self) -> Iterator[None]:
        """Indices that hold no rule are made after the rows."""
        if self._sqlite:
            query = "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND name LIKE 'ix_%'"
        else:
            query = "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' AND indexname LIKE 'ix_%'"
        found = self._driver.execute(query).fetchall()  # type: ignore[union-attr]
        for name, _ in found:
            self._driver.execute(f"DROP INDEX {name}")  # type: ignore[union-attr]
        yield
        for _, statement in found:
            self._driver.execute(statement)  # type: ignore[union-attr]

    def finish(self) -> None:
        """Commit, and leave PostgreSQL as autovacuum would; the server asks SQLite for nothing of the kind."""
        if self._sqlite:
            self._driver.execute("COMMIT")  # type: ignore[union-attr]
            self._driver.execute("PRAGMA foreign_keys=ON")  # type: ignore[union-attr]
        else:
            self._driver.commit()  # type: ignore[union-attr]
            self._driver.autocommit = True  # type: ignore[union-attr]
            self._driver.execute("SET session_replication_role=DEFAULT")  # type: ignore[union-attr]
            self._driver.execute("VACUUM ANALYZE")  # type: ignore[union-attr]
            self._driver.autocommit = False  # type: ignore[union-attr]
        self._raw.close()


def _defaults(table: type[Base], given: Sequence[str]) -> dict[str, Any]:
    """Values of the columns that must not be null, for a row that does not say them."""
    found: dict[str, Any] = {}
    for column in table.__table__.columns:
        if not column.nullable and column.name not in given and column.autoincrement is not True:
            default = column.default.arg if column.default is not None and column.default.is_scalar else None
            neutral = utc_now if isinstance(column.type, UtcDateTime) else column.type.python_type
            found[column.name] = neutral() if default is None else default
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, (dict, list)):
        return json.dumps(value)
    if isinstance(value, dt.datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S.%f")
    return value


@dataclass(frozen=True)
class Kind:
    """Devices that are alike."""

    profile: Profile
    facts: dict[str, Any]


@dataclass(frozen=True)
class One:
    """A device: what it is, and its models with the index of the version that serves."""

    id: str
    kind: Kind
    site: str
    online: bool
    serving: tuple[tuple[int, int], ...]
    fell_back: bool


@dataclass(frozen=True)
class BigFleet:
    """What was written: names that questions may have in them."""

    devices: int
    device_id: str
    rollout_id: str
    model: str
    version: str
    profile: str
    now: dt.datetime
    rows: dict[str, int] = field(default_factory=dict)


class Builder:
    """Writes one fleet.

    Args:
        loader: of an empty database with every table.
        devices: how many.
        now: when it is as it is.
        seed: of everything that is left to chance.
    """

    def __init__(self, loader: Loader, devices: int, now: dt.datetime, seed: int = 1) -> None:
        self._loader, self._count, self._now = loader, devices, now
        self._random = random.Random(seed)
        self._fleet = DEFAULT_FLEET
        self.rows: dict[str, int] = {}
        self.kinds = [self._kind(name) for name in shipped.names()]
        self.versions = [[new_id() for _ in range(VERSIONS)] for _ in MODELS]
        self.models = [new_id() for _ in MODELS]
        self.rollouts = [[new_id() for _ in range(VERSIONS)] for _ in MODELS]
        self.ones = [self._one(number) for number in range(devices)]
        self.sketches = [self._sketch(1 + number) for number in range(64)]

    def _kind(self, name: str) -> Kind:
        given = shipped.load(name)
        spec = ProfileCreate.model_validate({**given, "name": name}).model_dump(mode="json")
        facts = msgspec.to_builtins(of_profile(given))
        facts["cpu_features"] = sorted({*facts["cpu_features"], *FEATURES.get(facts["arch"], ())})
        kept = {key: value for key, value in spec.items() if key not in {"name", "delivery", "allow_unknown_runtime"}}
        return Kind(Profile(id=new_id(), fleet_id=self._fleet, name=name, spec=kept), facts)

    def _one(self, number: int) -> One:
        draw = self._random.random
        served = {number % len(MODELS)} | ({(number + 1) % len(MODELS)} if draw() < 0.3 else set())
        back = (0 if draw() < 0.7 else 1 if draw() < 0.8 else 2 for _ in served)
        serving = tuple((model, VERSIONS - 1 - by) for model, by in zip(sorted(served), back, strict=True))
        kind = self._random.choice(self.kinds)
        return One(f"cam-{number:06d}", kind, f"plant{number % 50}", draw() < 0.96, serving, draw() < 0.03)

    def _sketch(self, scale: int) -> tuple[int, bytes]:
        buckets = {bucket_of(0.001 * scale * 1.04**step): 1 + (scale * step) % 9 for step in range(20)}
        return sum(buckets.values()), pack_latency(buckets)

    def insert(self, table: type[Base], columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        def counted() -> Iterator[Sequence[Any]]:
            for row in rows:
                self.rows[table.__tablename__] = self.rows.get(table.__tablename__, 0) + 1
                yield row

        self._loader.insert(table, columns, counted())

    def catalog(self) -> None:
        """Profiles, models, versions, variants, gate runs."""
        past = self._now - dt.timedelta(days=DAYS)
        self.insert(
            Profile, ("id", "fleet_id", "name", "spec", "created_at"),
            ((one.profile.id, self._fleet, one.profile.name, one.profile.spec, past) for one in self.kinds),
        )  # fmt: skip
        self.insert(
            Model, ("id", "fleet_id", "name", "description", "created_at"),
            ((one, self._fleet, name, "", past) for one, name in zip(self.models, MODELS, strict=True)),
        )  # fmt: skip
        found = [(model, index) for model in range(len(MODELS)) for index in range(VERSIONS)]
        self.insert(
            Version,
            ("id", "fleet_id", "model_id", "name", "inputs", "outputs", "labels", "gate", "inspection", "created_at"),
            ((self.versions[model][index], self._fleet, self.models[model], str(index + 1), [], [], [], {}, {}, past)
             for model, index in found),
        )  # fmt: skip
        self.variants = {(model, index, one.profile.id): new_id() for model, index in found for one in self.kinds}
        manifest = {"name": "x" * 800}
        self.insert(
            Variant,
            ("id", "fleet_id", "version_id", "profile_id", "profile_spec", "state", "manifest", "candidates",
             "created_at", "updated_at"),
            ((self.variants[model, index, one.profile.id], self._fleet, self.versions[model][index], one.profile.id,
              one.profile.spec, "building" if index == VERSIONS - 1 and one is self.kinds[0] else "ready", manifest,
              [], past, past) for model, index in found for one in self.kinds),
        )  # fmt: skip
        self.insert(
            GateRun, ("id", "fleet_id", "variant_id", "state", "candidates", "data", "deadline_at", "created_at"),
            ((new_id(), self._fleet, one, "passed", [], {}, past, past) for one in self.variants.values()),
        )  # fmt: skip
        strategy = {"stages": [{"percent": 100}]}
        self.insert(
            Rollout,
            ("id", "fleet_id", "name", "version_id", "state", "target", "strategy", "stage", "let_on", "joined_after",
             "verdicts", "terms", "created_by", "creator_id", "approvals_needed", "approvals", "created_at"),
            ((self.rollouts[model][index], self._fleet, f"{MODELS[model]} {index + 1}", self.versions[model][index],
              _state(model, index), {"all": True}, strategy, 0, 0, "", [], {}, "ada", "ada", 0, [],
              past + dt.timedelta(days=index * 3)) for model, index in found),
        )  # fmt: skip

    def devices(self) -> None:
        """Devices and what they can be asked for by, identities and requests to enrol."""
        self.insert(
            Device,
            ("id", "fleet_id", "facts", "tags", "profile_id", "profile_pinned", "online", "last_seen_at", "boot_id",
             "reported_sequence", "reported_revision", "reported_deployments", "serving", "problems",
             "desired_revision", "created_at"),
            ((one.id, self._fleet, one.kind.facts, _tags(one, number), one.kind.profile.id, False, one.online,
              self._now - dt.timedelta(seconds=number % 30 if one.online else number % 90_000), "b", 9, 3, [],
              self._serving(one), [], 3, self._now - dt.timedelta(days=DAYS, seconds=-number))
             for number, one in enumerate(self.ones)),
        )  # fmt: skip
        self.insert(
            DeviceAttribute, ("device_id", "name", "text", "fleet_id", "number"),
            ((one.id, row.name, row.text, self._fleet, row.number) for number, one in enumerate(self.ones)
             for row in sorted(attributes_of(one.kind.facts, _tags(one, number), self._serving(one)))),
        )  # fmt: skip
        past = self._now - dt.timedelta(days=DAYS)
        self.insert(
            DeviceIdentity, ("device_id", "fleet_id", "tags", "created_at", "created_by", "revoked_at", "evict"),
            ((one.id, self._fleet, {}, past, "token", self._now if number % 500 == 0 else None, False)
             for number, one in enumerate(self.ones)),
        )  # fmt: skip
        self.insert(
            Enrolment,
            ("id", "fleet_id", "device_id", "key_sha256", "csr", "state", "reason", "address", "created_at"),
            ((new_id(), self._fleet, one.id, f"{number:064x}", "x" * 500, "pending" if number % 1000 == 0 else "issued",
              "", "192.0.2.7", past) for number, one in enumerate(self.ones)),
        )  # fmt: skip

    def _serving(self, one: One) -> list[dict[str, Any]]:
        providers = one.kind.profile.spec["providers"]
        return [
            {
                "model": MODELS[model],
                "version": str(index + 1),
                "digest": "a" * 64,
                "deployment_id": f"d-{model}-{index}",
                "runtime": "onnx",
                "provider": "cpu" if one.fell_back else providers[0],
                "load_s": 0.1,
                "fell_back": "its provider failed" if one.fell_back else "",
            }
            for model, index in one.serving
        ]

    def deployments(self) -> None:
        """Of every device those of the last versions of its models; a few are under way, and a few failed."""
        self.insert(
            Deployment,
            ("id", "fleet_id", "rollout_id", "device_id", "model_id", "version_id", "variant_id", "revert_of", "stage",
             "place", "attempt", "replaced", "phase", "desired", "loading_s", "fell_back", "is_waiting",
             "received_bytes", "encoding", "missing_chunks", "sources", "attempts", "created_at", "sent_at",
             "settled_at"),
            ((new_id(), self._fleet, self.rollouts[model][index], one.id, self.models[model],
              self.versions[model][index], self.variants[model, index, one.kind.profile.id], "", 0, number, 0, False,
              phase, phase == "active", 0.1, "", False, 9_000_000, "", 0, {"mqtt": 9_000_000}, 1, at, at, at)
             for index in range(VERSIONS - KEPT, VERSIONS) for number, one in enumerate(self.ones)
             for model, serves in one.serving
             for at in [self._now - dt.timedelta(days=(VERSIONS - 1 - index) * 4)]
             for phase in [self._phase(index, serves)]),
        )  # fmt: skip

    def _phase(self, index: int, serves: int) -> str:
        if index <= serves:
            return "active" if index == serves else "superseded"
        if index < VERSIONS - 1:
            return "failed"
        return self._random.choice(("scheduled", "scheduled", "downloading", "pending", "failed"))

    def telemetry(self) -> None:
        """Series, sums of days and hours, windows of the last minute, sums of the fleet."""
        series = [
            (model, index, one) for one in self.ones for model, serves in one.serving for index in (serves - 1, serves)
        ]
        self.insert(
            TelemetrySeries, ("id", "fleet_id", "device_id", "deployment_id", "model", "version", "digest", "provider"),
            ((number, self._fleet, one.id, f"d-{model}-{index}", MODELS[model], str(index + 1), "a" * 64, "cpu")
             for number, (model, index, one) in enumerate(series, 1)),
        )  # fmt: skip
        half, hour = DAYS // 2, period_of(self._now, HOUR_S)
        today = period_of(self._now - dt.timedelta(hours=HOURS), DAY_S)
        before = [(DAY_S, today - dt.timedelta(days=age)) for age in range(DAYS - 1, half, -1)]
        lately = [(DAY_S, today - dt.timedelta(days=age)) for age in range(half, 0, -1)]
        lately += [(HOUR_S, hour - dt.timedelta(hours=age)) for age in range(HOURS - 1, -1, -1)]
        self.insert(
            TelemetryRollup,
            ("series_id", "step_s", "period_at", "started_at", "ended_at", "busy_s", "requests", "errors", "rejected",
             "items", "latency", "confusion"),
            self._rollups(len(series), before, lately),
        )  # fmt: skip
        serving = range(2, len(series) + 1, 2)
        groups = -(-len(serving) // GROUP)
        self.insert(
            TelemetryGroup, ("id", "fleet_id", "stored_at", "rolled_up", "emptied"),
            ((1 + window * groups + number, self._fleet, self._ended(window), window < ROLLED_UP, False)
             for window in range(WINDOWS) for number in range(groups)),
        )  # fmt: skip
        self.insert(
            ModelWindowRow,
            ("group_id", "number", "series_id", "started_at", "ended_at", "requests", "errors", "rejected", "items",
             "latency", "confusion", "judged"),
            ((1 + window * groups + number // GROUP, number % GROUP, one, self._ended(window - 1), self._ended(window),
              requests, 0, 0, requests, latency, b"", True) for window in range(WINDOWS)
             for number, one in enumerate(serving) for requests, latency in [self.sketches[one % 64]]),
        )  # fmt: skip
        self.insert(
            HostWindowRow, ("fleet_id", "device_id", "ended_at", "cpu_percent", "memory_used_mb"),
            ((self._fleet, one.id, self._ended(window), 12.5, 900.0) for window in range(WINDOWS) for one in self.ones),
        )  # fmt: skip

    def _ended(self, window: int) -> dt.datetime:
        return self._now - dt.timedelta(seconds=(WINDOWS - window) * WINDOW_S)

    def _rollups(
        self, series: int, before: Sequence[tuple[int, dt.datetime]], lately: Sequence[tuple[int, dt.datetime]]
    ) -> Iterator[Sequence[Any]]:
        spans = [
            [(step, at, at, at + dt.timedelta(seconds=step - 5)) for step, at in periods]
            for periods in (before, lately)
        ]
        if isinstance(self._loader._driver, sqlite3.Connection):  # once, not a million times
            spans = [[tuple(_plain(one) for one in span) for span in found] for found in spans]
        for one in range(1, series + 1):
            requests, latency = self.sketches[one % 64]
            for span in spans[(one - 1) % 2]:
                yield (one, *span, 900.0, requests, 1, 0, requests, latency, b"")

    def whole_fleet(self) -> None:
        """Sums of the fleet, and how it was."""
        requests, latency = self.sketches[3]
        hour, fine = period_of(self._now, HOUR_S), period_of(self._now, FLEET_S)
        periods = [(HOUR_S, hour - dt.timedelta(hours=age)) for age in range(DAYS * 24)]
        periods += [(FLEET_S, fine - dt.timedelta(seconds=age * FLEET_S)) for age in range(288)]
        self.insert(
            TelemetryFleetTotal, ("fleet_id", "step_s", "period_at", "requests", "errors", "latency"),
            ((self._fleet, step, at, requests * self._count, self._count, latency) for step, at in periods),
        )  # fmt: skip
        versions = [
            {"model": name, "version": str(index + 1), "devices": self._count // 18}
            for name in MODELS for index in range(VERSIONS - 3, VERSIONS)
        ]  # fmt: skip
        self.insert(
            FleetSnapshot, ("fleet_id", "hour_at", "devices", "online", "versions"),
            ((self._fleet, at, self._count, self._count * 24 // 25, versions)
             for step, at in periods if step == HOUR_S),
        )  # fmt: skip

    def beside(self) -> None:
        """The audit log, samples and webhooks."""
        past = self._now - dt.timedelta(days=DAYS)
        events = min(self._count * 2, 200_000)
        actions = ("device.register", "rollout.create", "device.update", "rollout.pause")
        self.insert(
            AuditEvent,
            ("id", "fleet_id", "sequence", "at", "actor", "address", "request_id", "action", "subject", "detail",
             "previous_hash", "hash"),
            ((new_id(), self._fleet, number, past + dt.timedelta(seconds=number), f"user/{number % 20}", "192.0.2.7",
              "r", actions[number % 4], f"device/{self.ones[number % self._count].id}", {}, "0" * 64, "0" * 64)
             for number in range(1, events)),
        )  # fmt: skip
        hook, request = new_id(), new_id()
        self.insert(
            Webhook, ("id", "fleet_id", "url", "description", "types", "active", "secret", "created_by", "created_at"),
            [(hook, self._fleet, "https://hooks.invalid/", "", ["shoal.*"], False, "whsec", "ada", past)],
        )  # fmt: skip
        letters = [
            (new_id(), self._fleet, hook, f"{number}", f"shoal.test.{number % 5}", f"x/{number}", "{}",
             "dead" if number % 50 == 0 else "delivered", 0, past, past) for number in range(min(self._count, 20_000))
        ]  # fmt: skip
        self.insert(
            WebhookDelivery,
            ("id", "fleet_id", "webhook_id", "event_id", "type", "subject", "body", "state", "attempts", "next_at",
             "created_at"),
            letters,
        )  # fmt: skip
        self.insert(
            SampleRequestRow,
            ("id", "fleet_id", "model", "state", "samples", "size", "created_by", "created_at", "deadline_at"),
            [(request, self._fleet, MODELS[0], "done", 1, 1, "ada", past, past)],
        )  # fmt: skip
        self.insert(
            SampleUpload,
            ("id", "fleet_id", "request_id", "device_id", "phase", "told", "samples", "size", "received", "reason",
             "detail", "digest", "listing", "stored_at"),
            ((new_id(), self._fleet, request, one.id, "stored", False, 1, 1, 1, "", "", f"{number:064x}", [], past)
             for number, one in enumerate(self.ones[:2000])),
        )  # fmt: skip


def _state(model: int, index: int) -> str:
    if index < VERSIONS - 1:
        return "succeeded"
    return ("running", "running", "paused", "reverting", "succeeded", "stopped")[model]


def _tags(one: One, number: int) -> dict[str, str]:
    return {"site": one.site, "line": str(number % 7), "camera": f"c{number % 1000}"}


def build(database: Database, devices: int, told: Callable[[str], None] = lambda _: None) -> BigFleet:
    """Write a fleet into an empty database with every table.

    Args:
        database: where.
        devices: how many.
        told: is told what is done.
    """
    with database.write() as session:
        if session.get(Fleet, DEFAULT_FLEET) is None:
            session.add(Fleet(id=DEFAULT_FLEET))
    now = utc_now().replace(microsecond=0)
    loader = Loader(database)
    builder = Builder(loader, devices, now)
    with loader.without_indices():
        parts = (
            builder.catalog, builder.devices, builder.deployments, builder.telemetry, builder.whole_fleet,
            builder.beside,
        )  # fmt: skip
        for part in parts:
            part()
            told(f"{part.__name__} written")
    loader.finish()
    told("indices made")
    one = builder.ones[devices // 2]
    model, index = one.serving[0]
    return BigFleet(
        devices, one.id, builder.rollouts[0][VERSIONS - 1], MODELS[model], str(index + 1), one.kind.profile.name, now,
        builder.rows,
    )  # fmt: skip
