"""users, roles, tokens, approvals of rollouts, and the audit log as a hash chain"""

from __future__ import annotations

import datetime as dt
import hashlib
import json

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
EVENT_COLUMNS = (
    ("sequence", sa.Integer(), "0"),
    ("address", sa.String(), ""),
    ("request_id", sa.String(), ""),
    ("before", sa.JSON(), None),
    ("after", sa.JSON(), None),
    ("previous_hash", sa.String(), ""),
    ("hash", sa.String(), ""),
)
EVENTS = sa.table(
    "audit_events",
    *(
        sa.column(name, sa.String())
        for name in ("id", "fleet_id", "actor", "action", "subject", "previous_hash", "hash")
    ),
    sa.column("at", TIME),
    sa.column("detail", sa.JSON()),
    sa.column("sequence", sa.Integer()),
)
HEADS = sa.table("audit_heads", sa.column("fleet_id"), sa.column("sequence"), sa.column("hash"))
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
    _chain_audit()


def _chain_audit() -> None:
    op.create_table(
        "audit_heads",
        sa.Column("fleet_id", sa.String(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("hash", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["fleet_id"], ["fleets.id"], name="fk_audit_heads_fleet_id_fleets"),
        sa.PrimaryKeyConstraint("fleet_id", name="pk_audit_heads"),
    )
    for name, kind, default in EVENT_COLUMNS:
        op.add_column("audit_events", sa.Column(name, kind, nullable=default is None, server_default=default))
    _link_what_is_there()
    op.create_index("uq_audit_events_chain", "audit_events", ["fleet_id", "sequence"], unique=True)
    # A later migration that copies this table (SQLite's way to change one) must make the triggers anew.
    if op.get_bind().dialect.name == "sqlite":
        for change in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER audit_events_no_{change.lower()} BEFORE {change} ON audit_events "
                "BEGIN SELECT RAISE(ABORT, 'audit_events is append-only'); END"
            )
    else:
        op.execute(
            "CREATE FUNCTION shoal_append_only() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION '% is append-only', TG_TABLE_NAME; END $$"
        )
        op.execute(
            "CREATE TRIGGER audit_events_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_events "
            "FOR EACH STATEMENT EXECUTE FUNCTION shoal_append_only()"
        )


def _link_what_is_there() -> None:
    """Events of before become the beginning of their fleet's chain, as `fleet_server.audit` would have written them."""
    connection = op.get_bind()
    heads: dict[str, tuple[int, str]] = {}
    for row in connection.execute(sa.select(EVENTS).order_by(EVENTS.c.fleet_id, EVENTS.c.id)).all():
        sequence, previous = heads.get(row.fleet_id, (0, "0" * 64))
        at = row.at.replace(tzinfo=dt.UTC) if row.at.tzinfo is None else row.at.astimezone(dt.UTC)
        content = {
            **{name: getattr(row, name) for name in ("action", "actor", "detail", "id", "subject")},
            "address": "",
            "after": None,
            "at": at.isoformat(),
            "before": None,
            "fleet": row.fleet_id,
            "request_id": "",
            "sequence": sequence + 1,
        }
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        own = hashlib.sha256(previous.encode() + text.encode()).hexdigest()
        values = {"sequence": sequence + 1, "previous_hash": previous, "hash": own}
        connection.execute(sa.update(EVENTS).where(EVENTS.c.id == row.id).values(values))
        heads[row.fleet_id] = (sequence + 1, own)
    for fleet_id, (sequence, own) in heads.items():
        connection.execute(sa.insert(HEADS).values(fleet_id=fleet_id, sequence=sequence, hash=own))


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        for change in ("update", "delete"):
            op.execute(f"DROP TRIGGER audit_events_no_{change}")
    else:
        op.execute("DROP TRIGGER audit_events_append_only ON audit_events")
        op.execute("DROP FUNCTION shoal_append_only()")
    op.drop_index("uq_audit_events_chain", "audit_events")
    for name, _, _ in EVENT_COLUMNS:
        op.drop_column("audit_events", name)
    op.drop_table("audit_heads")
    for name, _, _ in ROLLOUT_COLUMNS:
        op.drop_column("rollouts", name)
    op.drop_column("fleets", "approvals")
    for table in ("access_tokens", "grants", "users"):
        op.drop_table(table)
