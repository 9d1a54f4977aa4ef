"""Alembic's entry point: runs the revisions on the connection that the caller hands over."""

from __future__ import annotations

from alembic import context

from anamorph_keysvc.tables import Tenant


def run() -> None:
    """Run the revisions; each commits or leaves no trace."""
    connection = context.config.attributes["connection"]
    context.configure(
        connection=connection,
        target_metadata=Tenant.metadata,
        render_as_batch=True,
        compare_type=True,
        transaction_per_migration=True,
    )
    with context.begin_transaction():
        context.run_migrations()


run()
