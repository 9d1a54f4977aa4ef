"""``anamorph materialize``: one materialisation job, called by the operator.

The order comes on standard input, because the grant in it must be in no argument
list and no environment. Exit codes: 0 staged; 2 the order is malformed; 3 refused
for good, and reported as failed; anything else may be tried again with a new grant.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from pydantic import ConfigDict, Field, ValidationError

from anamorph import errors
from anamorph.wire.admin import Dtype, Failure, Materialized, Message, Profile, Progress
from anamorph.wire.ids import Label
from anamorph.wire.keyservice import KeyService

if TYPE_CHECKING:
    from anamorph.keys import TenantKey

REFUSED = 3
_FOR_GOOD = (
    errors.UnsupportedModel,
    errors.BaseRefused,
    errors.MaterializationError,
    errors.ReplicaError,
)
# Answers that say: this grant is void, or the version no longer waits for a replica.
_GRANT_OVER = (errors.Unauthenticated, errors.Forbidden, errors.NotFound, errors.Conflict, errors.Gone)
_REPORT_EVERY_S = 1.0


class Order(Message):
    """What the operator writes to the job's standard input.

    Args:
        keysvc: URL of the key service.
        grant: the materialisation grant: releases the root once, and reports.
        store: URL of the replica store; the replica is published there as ``tenant/model/vN``.
        scratch: folder for work in progress, on a disk of the control zone.
        base, profile, dtype: from the model record.
        allow_base: the operator's own list of where a base may come from: folders, ``hf://org/``.
        device: torch device of the products.
        workers: processes that fold.
    """

    model_config = ConfigDict(hide_input_in_errors=True)

    keysvc: str
    tenant: Label
    model: Label
    version: int = Field(ge=1)
    grant: str = Field(repr=False)
    store: str
    scratch: Path
    base: str
    profile: Profile
    dtype: Dtype
    allow_base: tuple[str, ...]
    device: str = "cpu"
    workers: int = Field(default=1, ge=1)

    @property
    def name(self) -> str:
        """Name in the store, and folder under ``scratch``."""
        return f"{self.tenant}/{self.model}/v{self.version}"


def materialize() -> None:
    """Run one materialisation job; its order is one JSON object on standard input."""
    try:
        order = Order.model_validate_json(sys.stdin.buffer.read())
    except ValidationError as error:
        fields = ", ".join(sorted({".".join(map(str, part["loc"])) for part in error.errors()}))
        typer.echo(f"error: the order on standard input is malformed: {fields or 'no JSON'}", err=True)
        raise typer.Exit(2) from None
    with KeyService(order.keysvc, order.grant) as keys:
        try:
            run(order, keys)
        except _FOR_GOOD as error:
            keys.fail(order.tenant, order.model, order.version, Failure(reason=str(error)[:500]))
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(REFUSED) from None


def run(order: Order, keys: KeyService, now: Callable[[], float] = time.monotonic) -> Materialized:
    """Release the root, make the replica, report it. Finished work of a killed run is taken up again.

    Raises:
        UnsupportedModel, BaseRefused, MaterializationError, ReplicaError: trying again will not help.
        ServiceError: the grant is void, or the key service does not answer.
    """
    from anamorph.pipeline import make_replica
    from anamorph.replica import Store

    report = _reporter(order, keys, now)
    # Fetched before the root is released: a long download must not happen with a root in memory.
    base = _base(order, report)
    scratch = order.scratch / order.name
    made = make_replica(
        base,
        Store(order.store),
        order.name,
        _released_key(order, keys),
        order.profile,
        scratch=scratch,
        dtype=order.dtype,
        device=order.device,
        workers=order.workers,
        progress=report,
    )
    keys.stage(order.tenant, order.model, order.version, made)
    shutil.rmtree(scratch, ignore_errors=True)
    return made


def _base(order: Order, report: Callable[[str, float], None]) -> Path:
    from anamorph.checkpoint.source import fetch_base
    from anamorph.replica.location import allowed_base

    base = allowed_base(order.base, order.allow_base)
    if isinstance(base, Path):
        return base
    report("download", 0.0)
    return fetch_base(base)


def _released_key(order: Order, keys: KeyService) -> TenantKey:
    from anamorph.keys import TenantKey

    release = keys.release(order.tenant, order.model, order.version, "materialize")
    key = TenantKey.from_root(release.material(), order.tenant, order.model, order.version)
    if key.id != release.key_id:
        raise errors.KeyMismatch("the released root does not have the key id that the service names")
    return key


def _reporter(order: Order, keys: KeyService, now: Callable[[], float]) -> Callable[[str, float], None]:
    """Reports progress about once a second; a void grant ends the job, a lost report does not."""
    last: tuple[str, float] = ("", -_REPORT_EVERY_S)

    def report(phase: str, done: float) -> None:
        nonlocal last
        if phase == last[0] and now() - last[1] < _REPORT_EVERY_S:
            return
        last = (phase, now())
        try:
            keys.progress(order.tenant, order.model, order.version, Progress(phase=phase, done=done))
        except _GRANT_OVER:
            raise
        except errors.ServiceError:
            return

    return report
