"""releases of the agent: versions of what is no model, for platforms that are no profiles of people's"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0031"
down_revision = "0030"
branch_labels = None
depends_on = None

TABLES = ("models", "profiles")


def upgrade() -> None:
    for table in TABLES:
        op.add_column(table, sa.Column("kind", sa.String(), nullable=False, server_default="model"))


def downgrade() -> None:
    """The rows of releases go: an older server would take them for models' versions."""
    releases = "SELECT versions.id FROM versions JOIN models ON models.id = model_id WHERE models.kind = 'agent'"
    for statement in (
        "UPDATE deployments SET previous_id = NULL WHERE version_id IN",
        "DELETE FROM deployments WHERE version_id IN",
        "DELETE FROM rollouts WHERE version_id IN",
        "DELETE FROM variants WHERE version_id IN",
        "DELETE FROM versions WHERE id IN",
    ):
        op.execute(f"{statement} ({releases})")
    op.execute("DELETE FROM models WHERE kind = 'agent'")
    op.execute("DELETE FROM profiles WHERE kind = 'platform'")
    op.execute("DELETE FROM trust_targets WHERE role = 'agent-releases'")
    for table in TABLES:
        with op.batch_alter_table(table) as batch:
            batch.drop_column("kind")
