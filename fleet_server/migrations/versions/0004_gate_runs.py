"""gate runs"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from fleet_server.db import UtcDateTime

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("variants", sa.Column("judged_against", sa.JSON(), nullable=True))
    op.create_table(
        "candidate_artifacts",
        sa.Column("variant_id", sa.String(), sa.ForeignKey("variants.id"), primary_key=True),
        sa.Column("digest", sa.String(), primary_key=True),
        sa.Column("fleet_id", sa.String(), sa.ForeignKey("fleets.id"), nullable=False),
    )
    op.create_table(
        "gate_runs",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("fleet_id", sa.String(), sa.ForeignKey("fleets.id"), nullable=False),
        sa.Column("variant_id", sa.String(), sa.ForeignKey("variants.id"), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("candidates", sa.JSON(), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.Column("verdict", sa.JSON(), nullable=True),
        sa.Column("detail", sa.String(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("deadline_at", UtcDateTime(), nullable=False),
        sa.Column("finished_at", UtcDateTime(), nullable=True),
    )
    op.create_table(
        "gate_trials",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("fleet_id", sa.String(), sa.ForeignKey("fleets.id"), nullable=False),
        sa.Column("run_id", sa.String(), sa.ForeignKey("gate_runs.id"), nullable=False),
        sa.Column("device_id", sa.String(), sa.ForeignKey("devices.id"), nullable=False),
        sa.Column("phase", sa.String(), nullable=False),
        sa.Column("results", sa.JSON(), nullable=False),
        sa.Column("failure", sa.JSON(), nullable=True),
    )
    op.create_index("ix_candidate_artifacts_digest", "candidate_artifacts", ["digest"])
    op.create_index("ix_gate_runs_fleet_id_id", "gate_runs", ["fleet_id", "id"])
    op.create_index("ix_gate_runs_variant_id", "gate_runs", ["variant_id"])
    op.create_index("ix_gate_runs_state", "gate_runs", ["state"])
    op.create_index("ix_gate_trials_run_id", "gate_trials", ["run_id"])
    op.create_index("ix_gate_trials_device_id_phase", "gate_trials", ["device_id", "phase"])


def downgrade() -> None:
    op.drop_table("gate_trials")
    op.drop_table("gate_runs")
    op.drop_table("candidate_artifacts")
    op.drop_column("variants", "judged_against")
