"""the overview: how fleets were, what they did, indices of its counts, and which devices fell back"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0027"
down_revision = "0026"
branch_labels = None
depends_on = None

KNOWN = sa.text("forgotten_at IS NULL")
INDEXES = (
    ("ix_rollouts_fleet_id_state_id", "rollouts", ["fleet_id", "state", "id"]),
    ("ix_rollouts_version_id", "rollouts", ["version_id"]),
    ("ix_deployments_fleet_id_phase_id", "deployments", ["fleet_id", "phase", "id"]),
    ("ix_variants_fleet_id_state_id", "variants", ["fleet_id", "state", "id"]),
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
    op.create_index(
        "ix_devices_counted", "devices", ["fleet_id", "profile_id", "online"],
        sqlite_where=KNOWN, postgresql_where=KNOWN,
    )  # fmt: skip
    _keep_fell_back()


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
    op.drop_index("ix_devices_counted", "devices")
    for name, table, _ in INDEXES:
        op.drop_index(name, table)
    op.drop_table("fleet_snapshots")
    op.drop_table("telemetry_fleet_totals")
