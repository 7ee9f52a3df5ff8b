"""forgotten devices"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from fleet_server.db import UtcDateTime

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("devices", sa.Column("forgotten_at", UtcDateTime(), nullable=True))


def downgrade() -> None:
    op.drop_column("devices", "forgotten_at")
