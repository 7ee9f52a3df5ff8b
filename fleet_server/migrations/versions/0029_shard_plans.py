"""shard plans: models that are cut into stages, and which device has which stage"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0029"
down_revision = "0028"
branch_labels = None
depends_on = None

TABLE = "shard_plans"


def upgrade() -> None:
    time = sa.DateTime(timezone=True)
    op.create_table(
        TABLE,
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("fleet_id", sa.String(), sa.ForeignKey("fleets.id"), nullable=False),
        sa.Column("version_id", sa.String(), sa.ForeignKey("versions.id"), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("order", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("stages", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("proof", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("detail", sa.String(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.Column("created_at", time, nullable=False),
        sa.Column("updated_at", time, nullable=False),
    )
    op.create_index("ix_shard_plans_fleet_id_id", TABLE, ["fleet_id", "id"])
    op.create_index("ix_shard_plans_version_id", TABLE, ["version_id"])
    op.create_index("ix_shard_plans_state", TABLE, ["state"])


def downgrade() -> None:
    op.drop_table(TABLE)
