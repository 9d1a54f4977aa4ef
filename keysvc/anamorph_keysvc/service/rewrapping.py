"""Following KEKs that rotate by themselves: what lies under an older version is rewrapped."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sqlmodel import Session, col, or_, select

from anamorph import errors
from anamorph_keysvc import deadline
from anamorph_keysvc.scope import WORKER
from anamorph_keysvc.service import lookup
from anamorph_keysvc.service.work import Service
from anamorph_keysvc.tables import KeyVersion, SigningKey, Tenant, Webhook
from anamorph_keysvc.wrapper import PLATFORM_KEK, Context, root_context, signing_context, webhook_context

_log = logging.getLogger(__name__)

BATCH = 100
_TENANTS = 50
_ROUND_S = 30.0
# Stands before every tenant's id: what is wrapped under the platform's KEK.
_PLATFORM = ""

OfTenant = KeyVersion | Webhook
Wrapped = OfTenant | SigningKey


@dataclass
class Rewrapper:
    """Goes through platform and tenants, some at a time, over and over; ``after`` is the last one passed.

    What fails at one keeps no other from its turn, and is raised in every round until a whole
    turn has passed without it: a count of rounds shows it however many tenants there are.

    Two processes may do the same: rows are changed by compare-and-set.
    """

    after: str | None = None
    _failed: list[Exception] = field(default_factory=list)
    _failed_before: list[Exception] = field(default_factory=list)

    def go_on(self, service: Service) -> int:
        """Rewrap what the next owners need; answers how many rows.

        Raises:
            Unavailable: the database or the key-management service does not answer.
            InvalidKey: a wrapped key does not open; all that do are rewrapped. Or whatever
                else failed first at an owner.
        """
        owners = _owners(service, self.after)
        done = 0
        with deadline.within(_ROUND_S):
            for owner in owners:
                done += self._follow(service, owner, first=owner == owners[0])
        if len(owners) < _TENANTS:
            self.after, self._failed_before, self._failed = None, self._failed, []
        for error in (*self._failed_before, *self._failed):
            raise error.with_traceback(None)
        return done

    def _follow(self, service: Service, owner: str, *, first: bool) -> int:
        done = 0
        try:
            done = rewrap_old(service, owner)
        except errors.Unavailable:
            # Whoever had a whole round for itself is passed by; the others had too little of this one.
            if first:
                self.after = owner
            raise
        except Exception as error:  # noqa: BLE001 -- one bad row must not stop all others' rewrapping
            said = error if isinstance(error, errors.AnamorphError) else type(error).__name__
            _log.error("rewrapping for %s: %s", f"tenant {owner}" if owner else "the platform", said)
            self._failed.append(error.with_traceback(None))  # whose frames hold rows and sessions
        self.after = owner
        return done


def _owners(service: Service, after: str | None) -> list[str]:
    """The next who have something wrapped, in order; the platform comes first."""
    keys = select(KeyVersion.tenant).where(
        KeyVersion.tenant == Tenant.id, col(KeyVersion.ciphertext).is_not(None)
    )
    webhooks = select(Webhook.id).where(Webhook.tenant == Tenant.id)
    page = (
        select(Tenant.id)
        .where(Tenant.id > (after or _PLATFORM), or_(keys.exists(), webhooks.exists()))
        .order_by(Tenant.id)
        .limit(_TENANTS)
    )
    with service.database.read(WORKER) as session:
        tenants = session.exec(page).all()
    return list(tenants) if after is not None else [_PLATFORM, *tenants][:_TENANTS]


def rewrap_old(service: Service, owner: str) -> int:
    """Rewrap what lies under an older version of an owner's KEK; answers how many rows.

    The KEK rotates by itself in the key-management service; nothing stops working for it.

    Raises:
        InvalidKey: some rows do not open, which the message names; the others are rewrapped.
    """
    kek, rows = _platforms(service) if owner == _PLATFORM else _tenants(service, owner)
    newest = service.wrapper.newest(kek)
    old = [row for row in rows if _kek_version(service, row) < newest]
    batches = [old[start : start + BATCH] for start in range(0, len(old), BATCH)]
    closed = [row for batch in batches for row in _rewrap_what_opens(service, kek, batch)]
    if closed:
        names = ", ".join(_name(row) for row in closed[:20])
        raise errors.InvalidKey(f"{len(closed)} wrapped keys do not open, so they stay as they are: {names}")
    return len(old)


def _platforms(service: Service) -> tuple[str, Sequence[Wrapped]]:
    with service.database.read(WORKER) as session:
        wrapped = select(SigningKey).where(col(SigningKey.ciphertext).is_not(None))
        return PLATFORM_KEK, session.exec(wrapped).all()


def _tenants(service: Service, tenant: str) -> tuple[str, Sequence[Wrapped]]:
    with service.database.read(WORKER) as session:
        return lookup.tenant(session, tenant).kek, list(survivors(session, tenant))


def survivors(session: Session, tenant: str) -> Iterable[OfTenant]:
    """All that is wrapped under a tenant's KEK."""
    alive = col(KeyVersion.ciphertext).is_not(None)
    yield from session.exec(select(KeyVersion).where(KeyVersion.tenant == tenant, alive))
    yield from session.exec(select(Webhook).where(Webhook.tenant == tenant))


def _kek_version(service: Service, row: Wrapped) -> int:
    try:
        return service.wrapper.kek_version(row.ciphertext or b"")
    except errors.InvalidKey:
        return 0  # of no version: it is among those that do not open


def _rewrap_what_opens(service: Service, kek: str, rows: Sequence[Wrapped]) -> list[Wrapped]:
    """The rows that do not open: halved until they are alone, so that few of them cost few calls."""
    try:
        rewrap_rows(service, kek, rows)
    except errors.InvalidKey:
        if len(rows) == 1:
            return list(rows)
        half = len(rows) // 2
        halves = (rows[:half], rows[half:])
        return [row for part in halves for row in _rewrap_what_opens(service, kek, part)]
    return []


def rewrap_rows(service: Service, kek: str, rows: Sequence[Wrapped]) -> None:
    """Store each row's secret under the newest version of the KEK, if nobody changed it meanwhile.

    Raises:
        InvalidKey: one does not open. None is changed then.
    """
    old = [(row.ciphertext or b"", context_of(row)) for row in rows]
    new = service.wrapper.rewrap(kek, old)
    for row, (before, _), after in zip(rows, old, new, strict=True):
        with service.database.write(WORKER) as session:
            current = _again(session, row)
            if current is not None and current.ciphertext == before:
                current.ciphertext = after
                if not isinstance(current, SigningKey):
                    current.kek_version = service.wrapper.kek_version(after)
                if isinstance(current, KeyVersion):
                    current.row_version += 1
                    current.updated_at = service.clock()
                session.add(current)


def context_of(row: Wrapped) -> Context:
    """The context that a row's secret is wrapped under."""
    if isinstance(row, SigningKey):
        return signing_context(row.kid)
    if isinstance(row, Webhook):
        return webhook_context(row.tenant, row.id)
    return root_context(row.tenant, row.model, row.version)


def _name(row: Wrapped) -> str:
    """How a message names a row; never what is in it."""
    if isinstance(row, SigningKey):
        return row.kid
    return row.id if isinstance(row, Webhook) else f"{row.model}/keys/{row.version}"


def _again(session: Session, row: Wrapped) -> Wrapped | None:
    if isinstance(row, SigningKey):
        return session.get(SigningKey, row.kid, with_for_update=True)
    if isinstance(row, Webhook):
        return session.get(Webhook, row.id, with_for_update=True)
    return session.get(KeyVersion, (row.tenant, row.model, row.version), with_for_update=True)
