"""drift: how far models on devices have moved, as the last look at it said"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0028"
down_revision = "0027"
branch_labels = None
depends_on = None

TABLE = "model_drifts"


def upgrade() -> None:
    time = sa.DateTime(timezone=True)
    op.create_table(
        TABLE,
        sa.Column("device_id", sa.String(), sa.ForeignKey("devices.id"), primary_key=True),
        sa.Column("model", sa.String(), primary_key=True),
        sa.Column("fleet_id", sa.String(), sa.ForeignKey("fleets.id"), nullable=False),
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("series_id", sa.BigInteger(), nullable=False),
        sa.Column("worst", sa.Float(), nullable=False),
        sa.Column("input_drift", sa.Float()),
        sa.Column("output_drift", sa.Float()),
        sa.Column("confidence_shift", sa.Float()),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("since", time, nullable=False),
        sa.Column("at", time, nullable=False),
        sa.UniqueConstraint("series_id", name="uq_model_drifts_series_id"),
    )
    for column in ("worst", "at"):
        op.create_index(f"ix_model_drifts_fleet_id_{column}_series_id", TABLE, ["fleet_id", column, "series_id"])


def downgrade() -> None:
    op.drop_table(TABLE)
