"""several servers: who they are, which devices' shards each serves, whose turn a message is, and boots gone by"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0030"
down_revision = "0029"
branch_labels = None
depends_on = None


def upgrade() -> None:
    time = sa.DateTime(timezone=True)
    op.create_table(
        "servers",
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("host", sa.String(), nullable=False),
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("shared", sa.String(), nullable=False),
        sa.Column("started_at", time, nullable=False),
        sa.Column("until", time, nullable=False),
    )
    op.create_table(
        "device_shards",
        sa.Column("shard", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("confirmed", sa.Boolean(), nullable=False),
    )
    op.create_table(
        "schema_floor",
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("revision", sa.String(), nullable=False),
    )
    with op.batch_alter_table("outbox") as table:
        table.add_column(sa.Column("shard", sa.Integer(), nullable=False, server_default=sa.text("0")))
    with op.batch_alter_table("devices") as table:
        table.add_column(sa.Column("earlier_boots", sa.JSON(none_as_null=True), nullable=True))


def downgrade() -> None:
    # Not in a batch, which makes the table anew on SQLite: other tables refer to it.
    op.drop_column("devices", "earlier_boots")
    op.drop_column("outbox", "shard")
    op.drop_table("schema_floor")
    op.drop_table("device_shards")
    op.drop_table("servers")
