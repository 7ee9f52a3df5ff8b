"""samples: which are kept on devices, who asked for them, and what came"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None


def upgrade() -> None:
    time = sa.DateTime(timezone=True)
    op.create_table(
        "sampling_rules",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("fleet_id", sa.String(), sa.ForeignKey("fleets.id"), nullable=False),
        sa.Column("model_id", sa.String(), sa.ForeignKey("models.id", ondelete="CASCADE"), nullable=False),
        sa.Column("profile_id", sa.String(), sa.ForeignKey("profiles.id", ondelete="CASCADE"), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.Column("created_at", time, nullable=False),
        sa.UniqueConstraint(
            "fleet_id", "model_id", "profile_id", name="uq_sampling_rules_fleet_id_model_id_profile_id"
        ),
    )
    op.create_index("ix_sampling_rules_profile_id", "sampling_rules", ["profile_id"])
    op.create_table(
        "sample_requests",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("fleet_id", sa.String(), sa.ForeignKey("fleets.id"), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("samples", sa.Integer(), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.Column("created_at", time, nullable=False),
        sa.Column("deadline_at", time, nullable=False),
        sa.Column("finished_at", time, nullable=True),
    )
    op.create_index("ix_sample_requests_fleet_id_id", "sample_requests", ["fleet_id", "id"])
    op.create_index("ix_sample_requests_state_deadline_at", "sample_requests", ["state", "deadline_at"])
    op.create_table(
        "sample_uploads",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("fleet_id", sa.String(), sa.ForeignKey("fleets.id"), nullable=False),
        sa.Column("request_id", sa.String(), sa.ForeignKey("sample_requests.id"), nullable=False),
        sa.Column("device_id", sa.String(), sa.ForeignKey("devices.id"), nullable=False),
        sa.Column("phase", sa.String(), nullable=False),
        sa.Column("told", sa.Boolean(), nullable=False),
        sa.Column("samples", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(), nullable=True),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("received", sa.Integer(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("detail", sa.String(), nullable=False),
        sa.Column("waiting", sa.JSON(), nullable=True),
        sa.Column("listing", sa.JSON(), nullable=True),
        sa.Column("stored_at", time, nullable=True),
        sa.Column("finished_at", time, nullable=True),
    )
    op.create_index("ix_sample_uploads_fleet_id_id", "sample_uploads", ["fleet_id", "id"])
    op.create_index("ix_sample_uploads_request_id", "sample_uploads", ["request_id"])
    op.create_index("ix_sample_uploads_device_id_told", "sample_uploads", ["device_id", "told"])
    op.create_index("ix_sample_uploads_digest", "sample_uploads", ["digest"])
    op.create_table(
        "sample_pieces",
        sa.Column("upload_id", sa.String(), sa.ForeignKey("sample_uploads.id"), primary_key=True),
        sa.Column("offset", sa.Integer(), primary_key=True),
        sa.Column("data", sa.LargeBinary(), nullable=False),
    )


def downgrade() -> None:
    for table in ("sample_pieces", "sample_uploads", "sample_requests", "sampling_rules"):
        op.drop_table(table)
