"""the overview: how fleets were, what they did, indices of its counts, and which devices fell back"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0027"
down_revision = "0026"
branch_labels = None
depends_on = None

INDEXES = (
    ("ix_rollouts_fleet_id_state_id", "rollouts", ["fleet_id", "state", "id"]),
    ("ix_rollouts_version_id", "rollouts", ["version_id"]),
    ("ix_deployments_fleet_id_phase_id", "deployments", ["fleet_id", "phase", "id"]),
    ("ix_deployments_fleet_id_device_id_id", "deployments", ["fleet_id", "device_id", "id"]),
    ("ix_devices_counted", "devices", ["fleet_id", "profile_id", "online", "forgotten_at"]),
    ("ix_devices_fleet_id_created_at_id", "devices", ["fleet_id", "created_at", "id"]),
    ("ix_enrolments_fleet_id_id", "enrolments", ["fleet_id", "id"]),
    ("ix_audit_events_fleet_id_subject_sequence", "audit_events", ["fleet_id", "subject", "sequence"]),
    ("ix_host_windows_fleet_id_id", "host_windows", ["fleet_id", "id"]),
    (
        "ix_telemetry_series_fleet_id_device_id_model_version",
        "telemetry_series",
        ["fleet_id", "device_id", "model", "version"],
    ),
    ("ix_variants_fleet_id_state_id", "variants", ["fleet_id", "state", "id"]),
)
COUNTED, BEFORE = ["revert_of", "replaced", "is_waiting"], ["rollout_id", "phase", "stage", "place"]
# Partial indices that SQLite did not use: it compares texts, and queries there say `= 0`.
PARTIAL = (
    ("ix_telemetry_groups_open", "telemetry_groups", ["id"], "NOT rolled_up", "rolled_up = 0"),
    ("ix_model_windows_to_judge", "model_windows", ["series_id"], "NOT judged", "judged = 0"),
)
ATTRIBUTES = sa.table(
    "device_attributes", *(sa.column(name, sa.String()) for name in ("device_id", "name", "text", "fleet_id"))
)


def upgrade() -> None:
    time = sa.DateTime(timezone=True)
    op.create_table(
        "telemetry_fleet_totals",
        sa.Column("fleet_id", sa.String(), sa.ForeignKey("fleets.id"), primary_key=True),
        sa.Column("step_s", sa.Integer(), primary_key=True),
        sa.Column("period_at", time, primary_key=True),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("errors", sa.BigInteger(), nullable=False),
        sa.Column("latency", sa.LargeBinary(), nullable=False),
    )
    op.create_index("ix_telemetry_fleet_totals_step_s_period_at", "telemetry_fleet_totals", ["step_s", "period_at"])
    op.create_table(
        "fleet_snapshots",
        sa.Column("fleet_id", sa.String(), sa.ForeignKey("fleets.id"), primary_key=True),
        sa.Column("hour_at", time, primary_key=True),
        sa.Column("devices", sa.Integer(), nullable=False),
        sa.Column("online", sa.Integer(), nullable=False),
        sa.Column("versions", sa.JSON(), nullable=False),
    )
    op.create_index("ix_fleet_snapshots_hour_at", "fleet_snapshots", ["hour_at"])
    for name, table, columns in INDEXES:
        op.create_index(name, table, columns)
    op.drop_index("ix_deployments_rollout_id_phase", "deployments")
    op.create_index("ix_deployments_rollout_id_phase", "deployments", BEFORE + COUNTED)
    _make_partial(in_words_of_sqlite=True)
    _keep_fell_back()


def _make_partial(*, in_words_of_sqlite: bool) -> None:
    if op.get_bind().dialect.name != "sqlite":
        return
    for name, table, columns, words, words_of_sqlite in PARTIAL:
        op.drop_index(name, table)
        where = sa.text(words_of_sqlite if in_words_of_sqlite else words)
        op.create_index(name, table, columns, sqlite_where=where)


def _keep_fell_back() -> None:
    """What devices said last; their next report that is another keeps it as `devices.attributes` does."""
    devices = sa.table(
        "devices", sa.column("id", sa.String()), sa.column("fleet_id", sa.String()), sa.column("serving", sa.JSON())
    )
    rows = []
    for one in op.get_bind().execute(sa.select(devices)):
        providers = {found.get("provider") for found in one.serving or () if found.get("fell_back")} - {None}
        rows += [
            {"device_id": one.id, "fleet_id": one.fleet_id, "name": "fell_back", "text": str(provider)[:256]}
            for provider in sorted(providers)
        ]
    if rows:
        op.bulk_insert(ATTRIBUTES, rows)


def downgrade() -> None:
    op.execute(sa.delete(ATTRIBUTES).where(ATTRIBUTES.c.name == "fell_back"))
    _make_partial(in_words_of_sqlite=False)
    op.drop_index("ix_deployments_rollout_id_phase", "deployments")
    op.create_index("ix_deployments_rollout_id_phase", "deployments", BEFORE)
    for name, table, _ in INDEXES:
        op.drop_index(name, table)
    op.drop_table("fleet_snapshots")
    op.drop_table("telemetry_fleet_totals")
