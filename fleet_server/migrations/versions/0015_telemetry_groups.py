"""telemetry in groups and series, sketches as bytes"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from alembic import op

from fleet_server.db import UtcDateTime, new_id

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

PIECE = 1000
NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
OF = ("device_id", "deployment_id", "model", "version", "digest", "provider")
COUNTS = ("requests", "errors", "rejected", "items")
HOST = ("cpu_percent", "memory_used_mb", "agent_rss_mb", "temperature_c", "disk_free_mb")
EMPTIED = ("model_windows", "host_windows", "telemetry_batches")


def upgrade() -> None:
    old = {name: _set_aside(name) for name in EMPTIED}
    op.create_table(
        "telemetry_groups",
        sa.Column("id", NUMBER, autoincrement=True, nullable=False),
        sa.Column("fleet_id", sa.String(), nullable=False),
        sa.Column("stored_at", UtcDateTime(), nullable=False),
        sa.Column("rolled_up", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("emptied", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.ForeignKeyConstraint(["fleet_id"], ["fleets.id"], name="fk_telemetry_groups_fleet_id_fleets"),
        sa.PrimaryKeyConstraint("id", name="pk_telemetry_groups"),
        sqlite_autoincrement=True,
    )
    opened = sa.text("NOT rolled_up")
    op.create_index(
        "ix_telemetry_groups_open", "telemetry_groups", ["id"], postgresql_where=opened, sqlite_where=opened
    )
    op.create_table(
        "telemetry_batches",
        sa.Column("device_id", sa.String(), nullable=False),
        sa.Column("spool_id", sa.String(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("fleet_id", sa.String(), nullable=False),
        sa.Column("group_id", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("device_id", "spool_id", "sequence", name="pk_telemetry_batches"),
    )
    op.create_index("ix_telemetry_batches_group_id", "telemetry_batches", ["group_id"])
    op.create_table(
        "telemetry_spools",
        sa.Column("device_id", sa.String(), nullable=False),
        sa.Column("spool_id", sa.String(), nullable=False),
        sa.Column("fleet_id", sa.String(), nullable=False),
        sa.Column("stored", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("device_id", "spool_id", name="pk_telemetry_spools"),
    )
    op.create_table(
        "telemetry_series",
        sa.Column("id", NUMBER, autoincrement=True, nullable=False),
        sa.Column("fleet_id", sa.String(), nullable=False),
        *(sa.Column(name, sa.String(), nullable=False) for name in OF),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name="fk_telemetry_series_device_id_devices"),
        sa.ForeignKeyConstraint(["fleet_id"], ["fleets.id"], name="fk_telemetry_series_fleet_id_fleets"),
        sa.PrimaryKeyConstraint("id", name="pk_telemetry_series"),
        sa.UniqueConstraint(*OF, name="uq_telemetry_series_of"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_telemetry_series_fleet_id_model_version", "telemetry_series", ["fleet_id", "model", "version"])
    op.create_index("ix_telemetry_series_deployment_id", "telemetry_series", ["deployment_id"])
    op.create_table(
        "model_windows",
        sa.Column("group_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("series_id", sa.BigInteger(), nullable=False),
        sa.Column("started_at", UtcDateTime(), nullable=False),
        sa.Column("ended_at", UtcDateTime(), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in COUNTS),
        sa.Column("latency", sa.LargeBinary(), nullable=False),
        sa.Column("confusion", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["series_id"], ["telemetry_series.id"], name="fk_model_windows_series_id_telemetry_series"
        ),
        sa.PrimaryKeyConstraint("group_id", "number", name="pk_model_windows"),
    )
    op.create_index("ix_model_windows_series_id_ended_at", "model_windows", ["series_id", "ended_at"])
    op.create_table(
        "host_windows",
        sa.Column("id", NUMBER, autoincrement=True, nullable=False),
        sa.Column("fleet_id", sa.String(), nullable=False),
        sa.Column("device_id", sa.String(), nullable=False),
        sa.Column("ended_at", UtcDateTime(), nullable=False),
        *(sa.Column(name, sa.Double(), nullable=True) for name in HOST),
        sa.PrimaryKeyConstraint("id", name="pk_host_windows"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_host_windows_fleet_id_device_id_id", "host_windows", ["fleet_id", "device_id", "id"])
    op.create_index("ix_host_windows_ended_at", "host_windows", ["ended_at"])
    _take_over(old)
    for name in reversed(list(old)):
        op.drop_table(old[name])


def _set_aside(name: str) -> str:
    """Give a table another name, and its constraints too: on PostgreSQL names of keys are of the whole schema."""
    aside = f"{name}_before"
    if op.get_bind().dialect.name == "postgresql":
        for kind, of in (("pk", ""), ("uq", "_device_id_spool_id_sequence")):
            op.execute(f"ALTER INDEX IF EXISTS {kind}_{name}{of} RENAME TO {kind}_{aside}{of}")
    for index in sa.inspect(op.get_bind()).get_indexes(name):
        if index["name"] is not None and "duplicates_constraint" not in index:
            op.drop_index(index["name"], name)
    op.rename_table(name, aside)
    return aside


def _take_over(old: dict[str, str]) -> None:
    """Rows as they were: batches and windows are in groups of their own, for which belonged to which is not known."""
    bind = op.get_bind()
    into = {
        name: sa.Table(name, sa.MetaData(), autoload_with=bind)
        for name in ("telemetry_groups", "telemetry_batches", "telemetry_series", "model_windows", "host_windows")
    }
    for rows in _pieces(f"SELECT * FROM {old['telemetry_batches']} ORDER BY fleet_id, id"):  # noqa: S608
        for fleet_id, mine in _by_fleet(rows):
            group = _new_group(into, fleet_id, max(one["received_at"] for one in mine))
            columns = ("device_id", "spool_id", "sequence", "fleet_id")
            names = [{name: one[name] for name in columns} | {"group_id": group} for one in mine]
            bind.execute(into["telemetry_batches"].insert(), names)
    known: dict[tuple[Any, ...], int] = {}
    for rows in _pieces(f"SELECT * FROM {old['model_windows']} ORDER BY fleet_id, id"):  # noqa: S608
        for fleet_id, mine in _by_fleet(rows):
            group = _new_group(into, fleet_id, max(one["ended_at"] for one in mine))
            windows = []
            for number, one in enumerate(mine):
                key = tuple(one[name] for name in OF)
                if key not in known:
                    values = {"fleet_id": fleet_id, **{name: one[name] for name in OF}}
                    made = bind.execute(into["telemetry_series"].insert(), values).inserted_primary_key
                    assert made is not None
                    known[key] = made[0]
                kept = {name: one[name] for name in ("started_at", "ended_at", *COUNTS)}
                windows.append({**kept, "group_id": group, "number": number, "series_id": known[key], **_packed(one)})
            bind.execute(into["model_windows"].insert(), windows)
    hosts = ("fleet_id", "device_id", "ended_at", *HOST)
    for rows in _pieces(f"SELECT * FROM {old['host_windows']} ORDER BY id"):  # noqa: S608
        bind.execute(into["host_windows"].insert(), [{name: one[name] for name in hosts} for one in rows])


def _packed(row: dict[str, Any]) -> dict[str, bytes]:
    latency = {int(bucket): count for bucket, count in _json(row["latency"]).items()}
    confusion = _json(row["confusion"])
    return {
        "latency": msgspec.msgpack.encode(latency) if latency else b"",
        "confusion": msgspec.msgpack.encode(confusion) if confusion else b"",
    }


def _json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _new_group(into: dict[str, sa.Table], fleet_id: str, at: Any) -> int:
    values = {"fleet_id": fleet_id, "stored_at": at, "rolled_up": False, "emptied": False}
    made = op.get_bind().execute(into["telemetry_groups"].insert(), values).inserted_primary_key
    assert made is not None
    return int(made[0])


def _pieces(query: str) -> Iterator[Sequence[dict[str, Any]]]:
    times = {"received_at": UtcDateTime(), "started_at": UtcDateTime(), "ended_at": UtcDateTime()}
    bind = op.get_bind()
    result = bind.execute(sa.text(query))
    keys = list(result.keys())
    result = bind.execute(sa.text(query).columns(**{name: kind for name, kind in times.items() if name in keys}))
    while rows := result.mappings().fetchmany(PIECE):
        yield [dict(row) for row in rows]


def _by_fleet(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["fleet_id"], []).append(row)
    return list(found.items())


def downgrade() -> None:
    old = {name: _set_aside(name) for name in EMPTIED}
    op.create_table(
        "telemetry_batches",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("fleet_id", sa.String(), nullable=False),
        sa.Column("device_id", sa.String(), nullable=False),
        sa.Column("spool_id", sa.String(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("received_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name="fk_telemetry_batches_device_id_devices"),
        sa.ForeignKeyConstraint(["fleet_id"], ["fleets.id"], name="fk_telemetry_batches_fleet_id_fleets"),
        sa.PrimaryKeyConstraint("id", name="pk_telemetry_batches"),
        sa.UniqueConstraint(
            "device_id", "spool_id", "sequence", name="uq_telemetry_batches_device_id_spool_id_sequence"
        ),
    )
    op.create_table(
        "model_windows",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("fleet_id", sa.String(), nullable=False),
        *(sa.Column(name, sa.String(), nullable=False) for name in OF),
        sa.Column("started_at", UtcDateTime(), nullable=False),
        sa.Column("ended_at", UtcDateTime(), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in COUNTS),
        sa.Column("latency", sa.JSON(), nullable=False),
        sa.Column("confusion", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name="fk_model_windows_device_id_devices"),
        sa.ForeignKeyConstraint(["fleet_id"], ["fleets.id"], name="fk_model_windows_fleet_id_fleets"),
        sa.PrimaryKeyConstraint("id", name="pk_model_windows"),
    )
    op.create_index("ix_model_windows_deployment_id_ended_at", "model_windows", ["deployment_id", "ended_at"])
    op.create_index(
        "ix_model_windows_fleet_id_device_id_ended_at", "model_windows", ["fleet_id", "device_id", "ended_at"]
    )
    op.create_table(
        "host_windows",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("fleet_id", sa.String(), nullable=False),
        sa.Column("device_id", sa.String(), nullable=False),
        sa.Column("ended_at", UtcDateTime(), nullable=False),
        *(sa.Column(name, sa.Double(), nullable=True) for name in HOST),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name="fk_host_windows_device_id_devices"),
        sa.ForeignKeyConstraint(["fleet_id"], ["fleets.id"], name="fk_host_windows_fleet_id_fleets"),
        sa.PrimaryKeyConstraint("id", name="pk_host_windows"),
    )
    op.create_index(
        "ix_host_windows_fleet_id_device_id_ended_at", "host_windows", ["fleet_id", "device_id", "ended_at"]
    )
    _give_back(old)
    for name in old.values():
        op.drop_table(name)
    for name in ("telemetry_series", "telemetry_spools", "telemetry_groups"):
        op.drop_table(name)


def _give_back(old: dict[str, str]) -> None:
    bind = op.get_bind()
    into = {name: sa.Table(name, sa.MetaData(), autoload_with=bind) for name in EMPTIED}
    names = f"""SELECT b.device_id, b.spool_id, b.sequence, b.fleet_id, g.stored_at AS received_at
        FROM {old["telemetry_batches"]} b JOIN telemetry_groups g ON g.id = b.group_id"""  # noqa: S608
    for rows in _pieces(names):
        bind.execute(into["telemetry_batches"].insert(), [{"id": new_id(), **one} for one in rows])
    # When those were stored whose names are in their spool's row is not known any more.
    for rows in _pieces(
        "SELECT device_id, spool_id, fleet_id, stored, CURRENT_TIMESTAMP AS received_at FROM telemetry_spools"
    ):
        for one in rows:
            flat = msgspec.msgpack.decode(one.pop("stored"), type=list[int])
            for first, last in zip(flat[0::2], flat[1::2], strict=True):
                for start in range(first, last + 1, PIECE):
                    numbers = range(start, min(last + 1, start + PIECE))
                    values = [{"id": new_id(), "sequence": number, **one} for number in numbers]
                    bind.execute(into["telemetry_batches"].insert(), values)
    of = ", ".join(f"s.{name}" for name in ("fleet_id", *OF))
    counts = ", ".join(f"w.{name}" for name in ("started_at", "ended_at", *COUNTS, "latency", "confusion"))
    windows = f"""SELECT {of}, {counts} FROM {old["model_windows"]} w JOIN telemetry_series s ON s.id = w.series_id
        ORDER BY w.group_id, w.number"""  # noqa: S608
    for rows in _pieces(windows):
        bind.execute(into["model_windows"].insert(), [{"id": new_id(), **one, **_unpacked(one)} for one in rows])
    columns = ", ".join(("fleet_id", "device_id", "ended_at", *HOST))
    for rows in _pieces(f"SELECT {columns} FROM {old['host_windows']} ORDER BY id"):  # noqa: S608
        bind.execute(into["host_windows"].insert(), [{"id": new_id(), **one} for one in rows])


def _unpacked(row: dict[str, Any]) -> dict[str, Any]:
    latency = msgspec.msgpack.decode(row["latency"], type=dict[int, int]) if row["latency"] else {}
    confusion = msgspec.msgpack.decode(row["confusion"]) if row["confusion"] else []
    return {"latency": {str(bucket): count for bucket, count in latency.items()}, "confusion": confusion}
