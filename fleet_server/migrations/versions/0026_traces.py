"""rollouts that are traced, from the request that created them on"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0026"
down_revision = "0023"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("rollouts") as table:
        table.add_column(sa.Column("traceparent", sa.String(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("rollouts") as table:
        table.drop_column("traceparent")
