"""``anamorph materialize``: one materialisation job, called by the operator.

The order comes on standard input, because the grant in it must be in no argument
list and no environment. Exit codes: 0 staged; 2 the order is malformed; 3 refused
for good, and reported as failed; anything else may be tried again with a new grant.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

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


class Task(Message):
    """What is to be made; nothing in it is secret.

    Args:
        keysvc: URL of the key service.
        store: URL of the replica store; the replica is published there as ``tenant/model/vN``.
        scratch: folder for work in progress, on a disk of the control zone.
        base, profile, dtype: from the model record.
        allow_base: the operator's own list of where a base may come from: folders, ``hf://org/``.
        device: torch device of the products.
        max_shard_size: bytes of a file of the replica.
    """

    model_config = ConfigDict(hide_input_in_errors=True)

    keysvc: str
    tenant: Label
    model: Label
    version: int = Field(ge=1)
    store: str
    scratch: Path
    base: str
    profile: Profile
    dtype: Dtype
    allow_base: tuple[str, ...]
    device: str = "cpu"
    max_shard_size: int = Field(default=2**29, ge=1)

    @property
    def name(self) -> str:
        """Name in the store, and folder under ``scratch``."""
        return f"{self.tenant}/{self.model}/v{self.version}"

    @property
    def place(self) -> Path:
        """Folder for this version's work in progress."""
        return self.scratch / self.name


class Order(Task):
    """What the operator writes to the job's standard input.

    Args:
        grant: the materialisation grant: releases the root once, and reports.
        workers: processes that fold.
    """

    grant: str = Field(repr=False)
    workers: int = Field(default=1, ge=1)


AnyTask = TypeVar("AnyTask", bound=Task)


def materialize() -> None:
    """Run one materialisation job; its order is one JSON object on standard input."""
    order = read(Order, sys.stdin.buffer.read(), "the order on standard input")
    with KeyService(order.keysvc, order.grant) as keys, reported(order, keys):
        run(order, keys, workers=order.workers)


def read(kind: type[AnyTask], content: bytes, what: str) -> AnyTask:
    """A task from JSON; one that is malformed ends the process with 2, and its fields are named."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        fields = ", ".join(sorted({".".join(map(str, part["loc"])) for part in error.errors()}))
        typer.echo(f"error: {what} is malformed: {fields or 'no JSON'}", err=True)
        raise typer.Exit(2) from None


@contextmanager
def reported(task: Task, keys: KeyService) -> Iterator[None]:
    """What is refused for good is reported as failed, and ends the process with ``REFUSED``."""
    try:
        yield
    except _FOR_GOOD as error:
        keys.fail(task.tenant, task.model, task.version, Failure(reason=str(error)[:500]))
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(REFUSED) from None


def run(
    task: Task,
    keys: KeyService,
    now: Callable[[], float] = time.monotonic,
    *,
    workers: int = 1,
    parts: int = 0,
) -> Materialized:
    """Release the root, make the replica, report it. Finished work of a killed run is taken up again.

    With ``parts`` others have folded so many parts already, and only the rest is done here.

    Raises:
        UnsupportedModel, BaseRefused, MaterializationError, ReplicaError: trying again will not help.
        ServiceError: the grant is void, or the key service does not answer.
    """
    from anamorph.pipeline import make_replica
    from anamorph.replica import Store

    report = _reporter(task, keys, now)
    # Fetched before the root is released: a long download must not happen with a root in memory.
    base = _base(task, report)
    made = make_replica(
        base,
        Store(task.store),
        task.name,
        _released_key(task, keys),
        task.profile,
        scratch=task.place,
        dtype=task.dtype,
        device=task.device,
        max_shard_size=task.max_shard_size,
        workers=workers,
        parts=parts,
        progress=report,
    )
    keys.stage(task.tenant, task.model, task.version, made)
    shutil.rmtree(task.place, ignore_errors=True)
    return made


def run_part(
    task: Task, keys: KeyService, index: int, of: int, now: Callable[[], float] = time.monotonic
) -> int:
    """Release the root for part ``index`` of ``of``, and fold that part in the folder that all parts share.

    Returns:
        Files that this call has written.

    Raises:
        As ``run``; also CheckpointError: parts of another fold lie there, or it is being finished.
    """
    from anamorph.pipeline import make_part
    from anamorph.replica import Store

    report = _reporter(task, keys, now)
    base = _base(task, report)
    return make_part(
        base,
        Store(task.store),
        task.name,
        _released_key(task, keys, index),
        task.profile,
        scratch=task.place,
        index=index,
        of=of,
        device=task.device,
        max_shard_size=task.max_shard_size,
        progress=report,
    )


def _base(task: Task, report: Callable[[str, float], None]) -> Path:
    from anamorph.checkpoint.source import fetch_base
    from anamorph.replica.location import allowed_base

    base = allowed_base(task.base, task.allow_base)
    if isinstance(base, Path):
        return base
    report("download", 0.0)
    return fetch_base(base)


def _released_key(task: Task, keys: KeyService, part: int | None = None) -> TenantKey:
    from anamorph.keys import TenantKey

    release = keys.release(task.tenant, task.model, task.version, "materialize", part=part)
    key = TenantKey.from_root(release.material(), task.tenant, task.model, task.version)
    if key.id != release.key_id:
        raise errors.KeyMismatch("the released root does not have the key id that the service names")
    return key


def _reporter(task: Task, keys: KeyService, now: Callable[[], float]) -> Callable[[str, float], None]:
    """Reports progress about once a second; a void grant ends the job, a lost report does not."""
    last: tuple[str, float] = ("", -_REPORT_EVERY_S)

    def report(phase: str, done: float) -> None:
        nonlocal last
        if phase == last[0] and now() - last[1] < _REPORT_EVERY_S:
            return
        last = (phase, now())
        try:
            keys.progress(task.tenant, task.model, task.version, Progress(phase=phase, done=done))
        except _GRANT_OVER:
            raise
        except errors.ServiceError:
            return

    return report
