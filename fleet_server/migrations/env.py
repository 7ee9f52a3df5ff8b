"""What Alembic runs: migrations on the connection it is given, within its transaction."""

from __future__ import annotations

from alembic import context

from fleet_server import models
from fleet_server.db import Base

assert models.Fleet.metadata is Base.metadata
context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
    transaction_per_migration=False,
)
context.run_migrations()
