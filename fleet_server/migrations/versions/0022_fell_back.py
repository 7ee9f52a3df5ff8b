"""deployments that another execution provider runs than the first wanted, and how long one is loaded"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("deployments") as table:
        table.add_column(sa.Column("fell_back", sa.String(), nullable=False, server_default=""))
        table.add_column(sa.Column("loading_s", sa.Float(), nullable=False, server_default=sa.text("0")))
        table.add_column(sa.Column("fell_back_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("deployments") as table:
        table.drop_column("fell_back_at")
        table.drop_column("fell_back")
        table.drop_column("loading_s")
