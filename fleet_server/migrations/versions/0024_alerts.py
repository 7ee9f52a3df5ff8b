"""alerts: rules, what came of them, who is told, silences, e-mails; drift is compared with what was first seen"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None

ROLLED_BACK, FELL_BACK = sa.text("phase = 'rolled_back'"), sa.text("fell_back <> ''")
OPEN = sa.text("state <> 'resolved'")


def upgrade() -> None:
    time = sa.DateTime(timezone=True)
    op.add_column("fleets", sa.Column("alert_defaults", sa.Integer(), nullable=False, server_default=sa.text("0")))
    op.create_index(
        "ix_deployments_rolled_back", "deployments", ["fleet_id", "settled_at"], sqlite_where=ROLLED_BACK,
        postgresql_where=ROLLED_BACK,
    )  # fmt: skip
    op.create_index(
        "ix_deployments_fell_back", "deployments", ["fleet_id"], sqlite_where=FELL_BACK, postgresql_where=FELL_BACK
    )
    op.create_index(
        "ix_device_certificates_fleet_id_device_id_not_after",
        "device_certificates",
        ["fleet_id", "device_id", "not_after"],
    )
    op.create_table(
        "alert_rules",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("fleet_id", sa.String(), sa.ForeignKey("fleets.id"), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("shipped", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("problem", sa.String(), nullable=False, server_default=""),
        sa.Column("clock_at", time, nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.Column("created_at", time, nullable=False),
        sa.UniqueConstraint("fleet_id", "name", name="uq_alert_rules_fleet_id_name"),
    )
    op.create_table(
        "alerts",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("fleet_id", sa.String(), sa.ForeignKey("fleets.id"), nullable=False),
        sa.Column("rule_id", sa.String(), nullable=False),
        sa.Column("rule", sa.String(), nullable=False),
        sa.Column("metric", sa.String(), nullable=False),
        sa.Column("severity", sa.String(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("device_id", sa.String(), nullable=True),
        sa.Column("model", sa.String(), nullable=True),
        sa.Column("rollout_id", sa.String(), nullable=True),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("value", sa.Float(), nullable=True),
        sa.Column("detail", sa.String(), nullable=False),
        sa.Column("since", time, nullable=False),
        sa.Column("firing_at", time, nullable=True),
        sa.Column("clearing_since", time, nullable=True),
        sa.Column("resolved_at", time, nullable=True),
        sa.Column("resolution", sa.String(), nullable=False),
        sa.Column("heard_at", time, nullable=True),
        sa.Column("acknowledged_at", time, nullable=True),
        sa.Column("acknowledged_by", sa.String(), nullable=False),
        sa.Column("comment", sa.String(), nullable=False),
    )
    op.create_index("ix_alerts_fleet_id_id", "alerts", ["fleet_id", "id"])
    op.create_index("ix_alerts_fleet_id_state_id", "alerts", ["fleet_id", "state", "id"])
    op.create_index("ix_alerts_rule_id_state_heard_at", "alerts", ["rule_id", "state", "heard_at"])
    op.create_index("ix_alerts_rule_id_resolved_at", "alerts", ["rule_id", "resolved_at"])
    op.create_index("ix_alerts_device_id_id", "alerts", ["device_id", "id"])
    op.create_index(
        "uq_alerts_open", "alerts", ["rule_id", "subject"], unique=True, sqlite_where=OPEN, postgresql_where=OPEN
    )
    op.create_table(
        "alert_routes",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("fleet_id", sa.String(), sa.ForeignKey("fleets.id"), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("shipped", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.Column("created_at", time, nullable=False),
        sa.UniqueConstraint("fleet_id", "name", name="uq_alert_routes_fleet_id_name"),
    )
    op.create_table(
        "alert_groups",
        sa.Column("rule_id", sa.String(), sa.ForeignKey("alert_rules.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("route_id", sa.String(), sa.ForeignKey("alert_routes.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("told_at", time, nullable=True),
        sa.Column("news_since", time, nullable=True),
    )
    op.create_table(
        "alert_silences",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("fleet_id", sa.String(), sa.ForeignKey("fleets.id"), nullable=False),
        sa.Column("rule", sa.String(), nullable=True),
        sa.Column("query", sa.Text(), nullable=True),
        sa.Column("subject", sa.String(), nullable=True),
        sa.Column("starts_at", time, nullable=False),
        sa.Column("ends_at", time, nullable=False),
        sa.Column("comment", sa.String(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.Column("created_at", time, nullable=False),
    )
    op.create_index("ix_alert_silences_fleet_id_ends_at", "alert_silences", ["fleet_id", "ends_at"])
    op.create_table(
        "alert_mails",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("fleet_id", sa.String(), sa.ForeignKey("fleets.id"), nullable=False),
        sa.Column("route_id", sa.String(), sa.ForeignKey("alert_routes.id", ondelete="CASCADE"), nullable=False),
        sa.Column("recipients", sa.JSON(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_at", time, nullable=False),
        sa.Column("last_detail", sa.String(), nullable=False),
        sa.Column("created_at", time, nullable=False),
        sa.Column("finished_at", time, nullable=True),
    )
    op.create_index("ix_alert_mails_state_next_at", "alert_mails", ["state", "next_at"])
    op.create_index("ix_alert_mails_route_id_id", "alert_mails", ["route_id", "id"])
    op.create_table(
        "drift_references",
        sa.Column(
            "series_id", sa.BigInteger(), sa.ForeignKey("telemetry_series.id", ondelete="CASCADE"), primary_key=True,
            autoincrement=False,
        ),
        sa.Column("shapes", sa.LargeBinary(), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("taken_at", time, nullable=False),
    )  # fmt: skip


def downgrade() -> None:
    for table in (
        "drift_references", "alert_mails", "alert_silences", "alert_groups", "alert_routes", "alerts", "alert_rules",
    ):  # fmt: skip
        op.drop_table(table)
    op.drop_index("ix_device_certificates_fleet_id_device_id_not_after", "device_certificates")
    op.drop_index("ix_deployments_fell_back", "deployments")
    op.drop_index("ix_deployments_rolled_back", "deployments")
    op.drop_column("fleets", "alert_defaults")
