"""conversion jobs: runners lost, not before, and the same work once at a time"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from fleet_server.db import UtcDateTime

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("conversion_jobs", sa.Column("lost", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("conversion_jobs", sa.Column("retry_at", UtcDateTime(), nullable=True))
    op.add_column("conversion_jobs", sa.Column("work", sa.String(), nullable=True))


def downgrade() -> None:
    op.drop_column("conversion_jobs", "work")
    op.drop_column("conversion_jobs", "retry_at")
    op.drop_column("conversion_jobs", "lost")
