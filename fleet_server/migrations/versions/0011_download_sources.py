"""which source brought how many bytes of a deployment"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("deployments", sa.Column("sources", sa.JSON(), nullable=False, server_default="{}"))


def downgrade() -> None:
    op.drop_column("deployments", "sources")
