"""commands: what devices are asked to do at once, and the log lines that came"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None


def upgrade() -> None:
    time = sa.DateTime(timezone=True)
    op.create_table(
        "device_commands",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("fleet_id", sa.String(), sa.ForeignKey("fleets.id"), nullable=False),
        sa.Column("device_id", sa.String(), sa.ForeignKey("devices.id"), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("arguments", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("code", sa.String(), nullable=False),
        sa.Column("detail", sa.String(), nullable=False),
        sa.Column("result", sa.JSON(), nullable=True),
        sa.Column("log_lines", sa.Integer(), nullable=False),
        sa.Column("log_dropped", sa.Integer(), nullable=False),
        sa.Column("log_sequence", sa.Integer(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.Column("created_at", time, nullable=False),
        sa.Column("deadline_at", time, nullable=False),
        sa.Column("sent_at", time, nullable=True),
        sa.Column("started_at", time, nullable=True),
        sa.Column("finished_at", time, nullable=True),
    )
    op.create_index("ix_device_commands_fleet_id_id", "device_commands", ["fleet_id", "id"])
    op.create_index("ix_device_commands_device_id_state", "device_commands", ["device_id", "state"])
    op.create_index("ix_device_commands_state_deadline_at", "device_commands", ["state", "deadline_at"])
    op.create_table(
        "command_log_lines",
        sa.Column("command_id", sa.String(), sa.ForeignKey("device_commands.id"), primary_key=True),
        sa.Column("sequence", sa.Integer(), primary_key=True),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("level", sa.String(), nullable=False),
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("logger", sa.String(), nullable=False),
        sa.Column("text", sa.String(), nullable=False),
    )


def downgrade() -> None:
    for table in ("command_log_lines", "device_commands"):
        op.drop_table(table)
