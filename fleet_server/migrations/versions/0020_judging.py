"""rollouts that judge: attempts, places, evidence, holds"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None

BEFORE = "uq_deployments_rollout_id_device_id_revert_of"
UNIQUE = f"{BEFORE}_attempt"


def upgrade() -> None:
    with op.batch_alter_table("rollouts") as table:
        table.add_column(sa.Column("began_at", sa.DateTime(timezone=True), nullable=True))
        table.add_column(sa.Column("let_on", sa.Integer(), nullable=False, server_default=sa.text("0")))
        table.add_column(sa.Column("joined_at", sa.DateTime(timezone=True), nullable=True))
        table.add_column(sa.Column("joined_after", sa.String(), nullable=False, server_default=""))
        table.add_column(sa.Column("pacing", sa.JSON(), nullable=True))
    with op.batch_alter_table("deployments") as table:
        table.add_column(sa.Column("place", sa.Integer(), nullable=False, server_default=sa.text("0")))
        table.add_column(sa.Column("attempt", sa.Integer(), nullable=False, server_default=sa.text("0")))
        table.add_column(sa.Column("replaced", sa.Boolean(), nullable=False, server_default=sa.false()))
        table.add_column(sa.Column("evidence", sa.LargeBinary(), nullable=True))
        table.add_column(sa.Column("exposure", sa.JSON(), nullable=True))
        table.add_column(sa.Column("exposed_at", sa.DateTime(timezone=True), nullable=True))
        table.drop_constraint(BEFORE, type_="unique")
        table.create_unique_constraint(UNIQUE, ["rollout_id", "device_id", "revert_of", "attempt"])
        table.create_index("ix_deployments_rollout_id_phase", ["rollout_id", "phase", "stage", "place"])
    op.add_column("model_windows", sa.Column("judged", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_index(
        "ix_model_windows_to_judge",
        "model_windows",
        ["series_id"],
        sqlite_where=sa.text("NOT judged"),
        postgresql_where=sa.text("NOT judged"),
    )
    op.add_column("devices", sa.Column("hold", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("devices", "hold")
    op.drop_index("ix_model_windows_to_judge", "model_windows")
    op.drop_column("model_windows", "judged")
    op.execute("DELETE FROM deployments WHERE replaced AND NOT desired")
    with op.batch_alter_table("deployments") as table:
        table.drop_index("ix_deployments_rollout_id_phase")
        table.drop_constraint(UNIQUE, type_="unique")
        table.create_unique_constraint(BEFORE, ["rollout_id", "device_id", "revert_of"])
        for name in ("exposed_at", "exposure", "evidence", "replaced", "attempt", "place"):
            table.drop_column(name)
    with op.batch_alter_table("rollouts") as table:
        for name in ("pacing", "joined_after", "joined_at", "let_on", "began_at"):
            table.drop_column(name)
