"""users, roles, tokens, and approvals of rollouts"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
ROLLOUT_COLUMNS = (
    ("terms", sa.JSON(), "{}"),
    ("created_by", sa.String(), ""),
    ("creator_id", sa.String(), ""),
    ("approvals_needed", sa.Integer(), "0"),
    ("approvals", sa.JSON(), "[]"),
)


def upgrade() -> None:
    op.create_table(
        "users",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("password_hash", sa.String(), nullable=False),
        sa.Column("server_wide", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_users"),
        sa.UniqueConstraint("name", name="uq_users_name"),
    )
    op.create_table(
        "grants",
        sa.Column("user_id", sa.String(), nullable=False),
        sa.Column("fleet_id", sa.String(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_grants_user_id_users"),
        sa.ForeignKeyConstraint(["fleet_id"], ["fleets.id"], name="fk_grants_fleet_id_fleets"),
        sa.PrimaryKeyConstraint("user_id", "fleet_id", name="pk_grants"),
    )
    op.create_index("ix_grants_fleet_id", "grants", ["fleet_id"])
    op.create_table(
        "access_tokens",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("user_id", sa.String(), nullable=True),
        sa.Column("fleet_id", sa.String(), nullable=True),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("expires_at", TIME, nullable=False),
        sa.Column("revoked_at", TIME, nullable=True),
        sa.Column("last_used_at", TIME, nullable=True),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_access_tokens_user_id_users"),
        sa.ForeignKeyConstraint(["fleet_id"], ["fleets.id"], name="fk_access_tokens_fleet_id_fleets"),
        sa.PrimaryKeyConstraint("id", name="pk_access_tokens"),
    )
    op.create_index("ix_access_tokens_fleet_id_id", "access_tokens", ["fleet_id", "id"])
    op.create_index("ix_access_tokens_user_id", "access_tokens", ["user_id"])
    op.create_index("ix_access_tokens_expires_at", "access_tokens", ["expires_at"])
    op.add_column("fleets", sa.Column("approvals", sa.Integer(), nullable=False, server_default="0"))
    for name, kind, default in ROLLOUT_COLUMNS:
        op.add_column("rollouts", sa.Column(name, kind, nullable=False, server_default=default))


def downgrade() -> None:
    for name, _, _ in ROLLOUT_COLUMNS:
        op.drop_column("rollouts", name)
    op.drop_column("fleets", "approvals")
    for table in ("access_tokens", "grants", "users"):
        op.drop_table(table)
