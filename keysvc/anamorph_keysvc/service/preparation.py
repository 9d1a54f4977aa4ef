"""Preparing a version: its root is drawn, wrapped and stored, outside the rotation's transaction.

So a rotation is accepted while the key-management service is away, and goes on, in
whichever process comes first, when it is back.
"""

from __future__ import annotations

import base64
import logging

from anamorph import errors
from anamorph.keys import TenantKey
from anamorph.wire.states import State
from anamorph_keysvc import deadline
from anamorph_keysvc.scope import WORKER
from anamorph_keysvc.service import leases, lookup
from anamorph_keysvc.service.transition import change, subject
from anamorph_keysvc.service.work import ACTOR, Service
from anamorph_keysvc.tables import KeyVersion, Operation
from anamorph_keysvc.wrapper import KEY_BYTES, root_context

_AT_ONCE_S = 1.0
_ATTEMPT_S = 5.0

_log = logging.getLogger(__name__)


def prepare_due(service: Service) -> int:
    """Prepare every version that waits for it; answers how many there were.

    Raises:
        Unavailable: the database or the key-management service does not answer.
    """
    waiting = leases.due(service, "rotate")
    for operation in waiting:
        with deadline.within(_ATTEMPT_S + leases.GIVE_BACK_S):
            prepare(service, operation)
    return len(waiting)


def prepare_at_once(service: Service, operation: str) -> None:
    """Try for a moment, so that a rotation's caller seldom waits for the worker."""
    try:
        with deadline.within(_AT_ONCE_S + leases.GIVE_BACK_S):
            prepare(service, operation, _AT_ONCE_S)
    except errors.AnamorphError as error:
        _log.info("a version is left to the worker: %s", type(error).__name__)
        service.woken.set()


def prepare(service: Service, operation: str, seconds: float = _ATTEMPT_S) -> None:
    """Give the version of a rotation its key; nothing if it has one, or another process is at it.

    ``seconds`` is what the work may take; it leaves time to give the lease back.

    Raises:
        Unavailable: the database or the key-management service does not answer; it is tried again.
    """
    with leases.leased(service, operation) as ours, deadline.within(seconds):
        if not ours:
            return
        with service.database.read(WORKER) as session:
            row, version = _subject(session.get(Operation, operation)), None
            if row is not None:
                version = lookup.version(session, *row)
                kek = lookup.tenant(session, version.tenant).kek
        if version is not None and version.state is State.PENDING and version.key_id is None:
            _draw(service, version, kek)
        _done(service, operation)


def _subject(operation: Operation | None) -> tuple[str, str, int] | None:
    if operation is None or operation.model is None or operation.version is None:
        return None
    return operation.tenant, operation.model, operation.version


def _draw(service: Service, version: KeyVersion, kek: str) -> None:
    at = (version.tenant, version.model, version.version)
    root = service.entropy(KEY_BYTES)
    key = TenantKey.from_root(root, *at)
    ciphertext = service.wrapper.wrap(kek, root, root_context(*at))
    with service.work(ACTOR, WORKER) as work:
        row = lookup.version(work.session, *at)
        if row.state is not State.PENDING or row.key_id is not None:
            return  # cancelled or prepared meanwhile: this root was never used
        change(
            work,
            row,
            key_id=key.id,
            kcv=key.kcv,
            vocab_kcv=key.vocab_kcv,
            public_key=base64.b64encode(key.public_key()).decode(),
            ciphertext=ciphertext,
            kek_version=service.wrapper.kek_version(ciphertext),
        )
        work.record(row.tenant, "prepare", subject(row), key_id=key.id)


def _done(service: Service, operation: str) -> None:
    """The next step of a rotation is the operator's."""
    with service.database.write(WORKER) as session:
        row = session.get(Operation, operation, with_for_update=True)
        if row is not None:
            row.next_attempt_at = None
            session.add(row)
