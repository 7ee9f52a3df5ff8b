"""what devices saw of versions they watched"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("deployments", sa.Column("probation", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("deployments", "probation")
