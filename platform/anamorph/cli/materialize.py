"""``anamorph materialize``: one materialisation job in a single piece.

With ``--task`` and ``--token-file``, as in a pod, the job asks for a grant of its own. Without,
its order comes on standard input from an operator on the same machine, grant included: that
must be in no argument list and no environment. Exit codes: 0 staged; 2 the order is
malformed; 3 refused for good, and reported as failed; 143 ended by SIGTERM; anything
else, that too, may be tried again, with the same scratch and a new grant.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import Field

from anamorph import errors
from anamorph.cli import task as tasks
from anamorph.cli.machine.signals import end_at_once
from anamorph.cli.task import Task
from anamorph.wire.admin import Materialized, Progress
from anamorph.wire.hub import HubReference
from anamorph.wire.keyservice import KeyService
from anamorph.wire.objects import ObjectReference

if TYPE_CHECKING:
    from anamorph.keys import TenantKey

# Answers that say: this grant is void, or the version no longer waits for a replica.
_GRANT_OVER = (errors.Unauthenticated, errors.Forbidden, errors.NotFound, errors.Conflict, errors.Gone)
_REPORT_EVERY_S = 1.0


class Whole(Task):
    """What is to be made in a single piece.

    Args:
        workers: processes that fold.
    """

    workers: int = Field(default=1, ge=1)


class Order(Whole):
    """What the operator writes to the job's standard input.

    Args:
        grant: the materialisation grant: releases the root once, and reports.
    """

    grant: str = Field(repr=False)


def materialize(
    task: Annotated[
        Path | None, typer.Option("--task", help="JSON file: what is to be made. Default: standard input.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="Credential of a materialiser; with --task.")
    ] = None,
) -> None:
    """Run one materialisation job; without options its order is one JSON object on standard input."""
    end_at_once()
    if task is not None and token_file is not None:
        wanted = tasks.read(Whole, task.read_bytes(), str(task))
        made = tasks.under_grant(wanted, token_file, lambda keys: run(wanted, keys, workers=wanted.workers))
        typer.echo(made.replica)
        return
    if task is not None or token_file is not None:
        raise typer.BadParameter("--task and --token-file go together")
    order = tasks.read(Order, sys.stdin.buffer.read(), "the order on standard input")
    with KeyService(order.keysvc, order.grant) as keys, tasks.reported(order, keys):
        run(order, keys, workers=order.workers)


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
    # Fetched and checked before the root is released: neither may take its time with a root in memory.
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
        base_digest=task.base_digest,
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
    """The folder of the base, fetched first where it lies elsewhere, and of the digest that is asked for.

    Raises:
        BaseRefused: not allowed, not there, not whole, or another one.
        CheckpointError, StoreUnavailable: it cannot be fetched or read now.
    """
    from anamorph.replica.location import allowed_base

    base = allowed_base(task.base, task.allow_base)
    folder = base if isinstance(base, Path) else _fetched(task, base, report)
    if task.base_digest is not None:
        report("digest", 0.0)
        _check_digest(folder, task.base_digest)
    return folder


def _fetched(task: Task, base: HubReference | ObjectReference, report: Callable[[str, float], None]) -> Path:
    from anamorph.checkpoint.source import fetch_base
    from anamorph.replica.plain import fetch_plain

    report("download", 0.0)
    if isinstance(base, HubReference):
        return fetch_base(base)
    return fetch_plain(str(base), task.place / "base", lambda done, total: report("download", done / total))


def _check_digest(base: Path, digest: str) -> None:
    from anamorph.checkpoint import Checkpoint

    found = Checkpoint.open(base).digest()
    if found != digest:
        raise errors.BaseRefused(f"the base has the digest {found}, and {digest} is asked for")


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
