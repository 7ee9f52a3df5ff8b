"""delivery policies, and what deployments wait for"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("profiles", sa.Column("delivery", sa.JSON(), nullable=True))
    op.add_column("rollouts", sa.Column("delivery", sa.JSON(), nullable=True))
    op.add_column("deployments", sa.Column("is_waiting", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("deployments", sa.Column("waiting", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("deployments", "waiting")
    op.drop_column("deployments", "is_waiting")
    op.drop_column("rollouts", "delivery")
    op.drop_column("profiles", "delivery")
