"""What the key service counts of itself; never ids of tenants' objects, never credentials."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from opentelemetry.metrics import CallbackOptions, Counter, Meter, Observation
from sqlmodel import col, func, select

from anamorph.telemetry import names
from anamorph.wire.states import State
from anamorph_keysvc.database import Database
from anamorph_keysvc.tables import KeyVersion


@dataclass(frozen=True)
class Metrics:
    """Counters of the service."""

    releases: Counter
    denials: Counter


def build_metrics(meter: Meter, database: Database) -> Metrics:
    """Register the instruments; versions by state are counted when somebody looks."""

    def versions(_options: CallbackOptions) -> Iterable[Observation]:
        counts = versions_by_state(database)
        return [Observation(count, {names.STATE: state.value}) for state, count in counts.items()]

    meter.create_observable_gauge(
        "anamorph.keysvc.versions", callbacks=[versions], description="Key versions by state"
    )
    return Metrics(
        releases=meter.create_counter("anamorph.keysvc.releases", description="Key material released"),
        denials=meter.create_counter("anamorph.keysvc.denials", description="Releases refused"),
    )


def versions_by_state(database: Database) -> dict[State, int]:
    """How many key versions are in each state, those without any included."""
    with database.read() as session:
        rows = session.exec(select(KeyVersion.state, func.count()).group_by(col(KeyVersion.state))).all()
    counted = dict.fromkeys(State, 0)
    counted.update({State(state): count for state, count in rows})
    return counted
