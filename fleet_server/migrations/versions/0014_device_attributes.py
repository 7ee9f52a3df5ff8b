"""attributes of devices, for queries"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from fleet_server.devices.attributes import attributes_of

revision = "0014"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    rows = op.create_table(
        "device_attributes",
        sa.Column("device_id", sa.String(), sa.ForeignKey("devices.id"), primary_key=True),
        sa.Column("name", sa.String(), primary_key=True),
        sa.Column("text", sa.String(), primary_key=True),
        sa.Column("fleet_id", sa.String(), sa.ForeignKey("fleets.id"), nullable=False),
        sa.Column("number", sa.Float(), nullable=True),
    )
    op.create_index("ix_device_attributes_text", "device_attributes", ["fleet_id", "name", "text"])
    op.create_index("ix_device_attributes_number", "device_attributes", ["fleet_id", "name", "number"])
    devices = sa.table(
        "devices",
        sa.column("id", sa.String()),
        sa.column("fleet_id", sa.String()),
        *(sa.column(name, sa.JSON()) for name in ("facts", "tags", "serving")),
    )
    for one in op.get_bind().execute(sa.select(devices)).all():
        # Whatever attributes are by then: a device's next report sets right what differs.
        found = attributes_of(one.facts, one.tags, one.serving)
        if found:
            op.bulk_insert(rows, [{"device_id": one.id, "fleet_id": one.fleet_id, **it._asdict()} for it in found])


def downgrade() -> None:
    op.drop_table("device_attributes")
