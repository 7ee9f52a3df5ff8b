"""weights of registered architectures"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("versions", sa.Column("training_digest", sa.String(), nullable=True))
    op.add_column("versions", sa.Column("architecture", sa.String(), nullable=True))
    op.add_column("source_forms", sa.Column("exported", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("conversion_jobs", sa.Column("training", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("conversion_jobs", "training")
    op.drop_column("source_forms", "exported")
    op.drop_column("versions", "architecture")
    op.drop_column("versions", "training_digest")
