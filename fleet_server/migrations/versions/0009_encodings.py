"""encodings"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from fleet_server.db import UtcDateTime

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "device_holdings",
        sa.Column("device_id", sa.String(), sa.ForeignKey("devices.id"), primary_key=True),
        sa.Column("digest", sa.String(), primary_key=True),
        sa.Column("fleet_id", sa.String(), sa.ForeignKey("fleets.id"), nullable=False),
    )
    op.create_index("ix_device_holdings_digest", "device_holdings", ["digest"])
    op.create_table(
        "encodings",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("fleet_id", sa.String(), sa.ForeignKey("fleets.id"), nullable=False),
        sa.Column("artifact", sa.String(), nullable=False),
        sa.Column("base", sa.String(), nullable=False),
        sa.Column("codec", sa.String(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("detail", sa.String(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.UniqueConstraint("fleet_id", "artifact", "base"),
    )
    op.create_index("ix_encodings_digest", "encodings", ["digest"])
    op.add_column("deployments", sa.Column("encoding", sa.String(), nullable=False, server_default=""))


def downgrade() -> None:
    op.drop_column("deployments", "encoding")
    op.drop_table("encodings")
    op.drop_table("device_holdings")
