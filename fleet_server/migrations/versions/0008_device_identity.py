"""device identity"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from fleet_server.db import UtcDateTime

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def fleet() -> sa.Column[str]:
    return sa.Column("fleet_id", sa.String(), sa.ForeignKey("fleets.id"), nullable=False)


def upgrade() -> None:
    op.create_table(
        "enrolment_tokens",
        sa.Column("id", sa.String(), primary_key=True),
        fleet(),
        sa.Column("secret_sha256", sa.String(), nullable=False, unique=True),
        sa.Column("device_id", sa.String(), nullable=True),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("uses_left", sa.Integer(), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
    )
    op.create_table(
        "device_identities",
        sa.Column("device_id", sa.String(), primary_key=True),
        fleet(),
        sa.Column("key_sha256", sa.String(), nullable=True),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.Column("revoked_at", UtcDateTime(), nullable=True),
        sa.Column("evict", sa.Boolean(), nullable=False),
        sa.Column("evicted_at", UtcDateTime(), nullable=True),
    )
    op.create_index("ix_device_identities_fleet_id_device_id", "device_identities", ["fleet_id", "device_id"])
    op.create_index("ix_device_identities_evict", "device_identities", ["evict"])
    op.create_table(
        "device_certificates",
        sa.Column("serial", sa.String(), primary_key=True),
        fleet(),
        sa.Column("device_id", sa.String(), sa.ForeignKey("device_identities.device_id"), nullable=False),
        sa.Column("key_sha256", sa.String(), nullable=False),
        sa.Column("pem", sa.Text(), nullable=False),
        sa.Column("not_before", UtcDateTime(), nullable=False),
        sa.Column("not_after", UtcDateTime(), nullable=False),
        sa.Column("revoked_at", UtcDateTime(), nullable=True),
    )
    op.create_index("ix_device_certificates_device_id_serial", "device_certificates", ["device_id", "serial"])
    op.create_index("ix_device_certificates_revoked_at", "device_certificates", ["revoked_at"])
    op.create_table(
        "enrolments",
        sa.Column("id", sa.String(), primary_key=True),
        fleet(),
        sa.Column("device_id", sa.String(), nullable=False),
        sa.Column("key_sha256", sa.String(), nullable=False),
        sa.Column("csr", sa.Text(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("address", sa.String(), nullable=False),
        sa.Column("token_id", sa.String(), nullable=True),
        sa.Column("serial", sa.String(), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("decided_at", UtcDateTime(), nullable=True),
        sa.Column("decided_by", sa.String(), nullable=True),
    )
    op.create_index("ix_enrolments_fleet_id_state_id", "enrolments", ["fleet_id", "state", "id"])
    op.create_index("ix_enrolments_device_id_key_sha256", "enrolments", ["device_id", "key_sha256"])
    op.create_table(
        "device_conduct",
        sa.Column("device_id", sa.String(), primary_key=True),
        fleet(),
        sa.Column("malformed", sa.BigInteger(), nullable=False),
        sa.Column("flooded", sa.BigInteger(), nullable=False),
        sa.Column("last_at", UtcDateTime(), nullable=False),
        sa.Column("last_detail", sa.String(), nullable=False),
        sa.Column("alerted_at", UtcDateTime(), nullable=True),
    )


def downgrade() -> None:
    for table in ("device_conduct", "enrolments", "device_certificates", "device_identities", "enrolment_tokens"):
        op.drop_table(table)
