"""roll-ups of telemetry windows

Going back drops them: windows that were removed since are gone with them, those that are kept count again.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from fleet_server.db import UtcDateTime

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "telemetry_rollups",
        sa.Column("series_id", sa.BigInteger(), nullable=False),
        sa.Column("step_s", sa.Integer(), nullable=False),
        sa.Column("period_at", UtcDateTime(), nullable=False),
        sa.Column("started_at", UtcDateTime(), nullable=False),
        sa.Column("ended_at", UtcDateTime(), nullable=False),
        sa.Column("busy_s", sa.Double(), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in ("requests", "errors", "rejected", "items")),
        sa.Column("latency", sa.LargeBinary(), nullable=False),
        sa.Column("confusion", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["series_id"], ["telemetry_series.id"], name="fk_telemetry_rollups_series_id_telemetry_series"
        ),
        sa.PrimaryKeyConstraint("series_id", "step_s", "period_at", name="pk_telemetry_rollups"),
    )
    op.create_index("ix_telemetry_rollups_step_s_period_at", "telemetry_rollups", ["step_s", "period_at"])


def downgrade() -> None:
    op.drop_table("telemetry_rollups")
    op.execute("UPDATE telemetry_groups SET rolled_up = false")
