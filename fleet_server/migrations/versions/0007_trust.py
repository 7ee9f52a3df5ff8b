"""signed manifests"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from fleet_server.db import UtcDateTime

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "trust_metadata",
        sa.Column("fleet_id", sa.String(), sa.ForeignKey("fleets.id"), primary_key=True),
        sa.Column("role", sa.String(), primary_key=True),
        sa.Column("version", sa.Integer(), primary_key=True),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
    )
    op.create_table(
        "trust_targets",
        sa.Column("fleet_id", sa.String(), sa.ForeignKey("fleets.id"), primary_key=True),
        sa.Column("path", sa.String(), primary_key=True),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("manifest", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
    )
    op.create_index("ix_trust_targets_fleet_id_role", "trust_targets", ["fleet_id", "role"])
    op.create_table(
        "trust_proposals",
        sa.Column("fleet_id", sa.String(), sa.ForeignKey("fleets.id"), primary_key=True),
        sa.Column("role", sa.String(), primary_key=True),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("trust_proposals")
    op.drop_table("trust_targets")
    op.drop_table("trust_metadata")
