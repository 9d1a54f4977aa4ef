"""Stops a chosen transition inside PostgreSQL, so that a process can be killed at exactly that point."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from psycopg import sql
from tests.keysvc.faults.calls import until

if TYPE_CHECKING:
    from tests.servers.production import Production

# Before the transition's last row is written; or while its transaction commits, when nothing but the
# answer to the process is missing: the change is then done although nobody was told.
Point = Literal["before", "commit"]
LOCK = 4711
FUNCTION = f"""
CREATE OR REPLACE FUNCTION wait_at_gate() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared({LOCK});
    RETURN NEW;
END $$
"""
TRIGGERS = {
    "before": "CREATE TRIGGER gate BEFORE INSERT ON audit FOR EACH ROW"
    " WHEN (NEW.tenant = {} AND NEW.action = {}) EXECUTE FUNCTION wait_at_gate()",
    "commit": "CREATE CONSTRAINT TRIGGER gate AFTER INSERT ON audit"
    " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW "
    "WHEN (NEW.tenant = {} AND NEW.action = {}) EXECUTE FUNCTION wait_at_gate()",
}
WAITING = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = %s AND NOT granted"


class Gate:
    """Is closed for one action of one tenant; ``wait`` returns once somebody stands before it."""

    def __init__(self, production: Production) -> None:
        self._production = production

    def wait(self) -> None:
        until(self._somebody_waits)

    def _somebody_waits(self) -> bool:
        with self._production.postgres.admin(self._production.database) as connection:
            row = connection.execute(WAITING, [LOCK]).fetchone()
        return row is not None and row[0] > 0


@contextmanager
def closed(production: Production, tenant: str, action: str, point: Point) -> Iterator[Gate]:
    """Until the end of the block no transaction gets past ``point`` of ``action``."""
    trigger = sql.SQL(TRIGGERS[point]).format(sql.Literal(tenant), sql.Literal(action))
    with production.postgres.admin(production.database) as connection:
        connection.execute(FUNCTION)
        connection.execute(trigger)
        connection.execute("SELECT pg_advisory_lock(%s)", [LOCK])
        try:
            yield Gate(production)
        finally:
            connection.execute("SELECT pg_advisory_unlock(%s)", [LOCK])
            connection.execute("DROP TRIGGER gate ON audit")
