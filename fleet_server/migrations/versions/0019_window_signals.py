"""what windows say beyond counts: confidence, predictions, sketches, crashes"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("model_windows", sa.Column("signals", sa.LargeBinary(), nullable=True))


def downgrade() -> None:
    op.drop_column("model_windows", "signals")
