"""Runs the migrations on the connection that the Database hands over."""

from __future__ import annotations

from alembic import context

from sailyard.lineage.schema import Base

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    # The caller holds one transaction around everything, on SQLite too, so that a killed
    # migration leaves nothing behind and a second process waits for the first.
    transactional_ddl=True,
    render_as_batch=True,
)
context.run_migrations()
