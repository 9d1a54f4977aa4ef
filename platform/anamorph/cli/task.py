"""What a materialisation job is to make, and the grant that it works under: shared by its commands."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from pydantic import ConfigDict, Field, ValidationError

from anamorph import errors
from anamorph.wire.admin import Digest, Dtype, Failure, Message, Profile
from anamorph.wire.ids import Label
from anamorph.wire.keyservice import KeyService

REFUSED = 3
_FOR_GOOD = (
    errors.UnsupportedModel,
    errors.BaseRefused,
    errors.MaterializationError,
    errors.ReplicaError,
)

TaskFile = Annotated[Path, typer.Option("--task", help="JSON file: what is to be made.")]
TokenFile = Annotated[Path, typer.Option("--token-file", help="Credential of a materialiser.")]


class Task(Message):
    """What is to be made; nothing in it is secret.

    Args:
        keysvc: URL of the key service.
        store: URL of the replica store; the replica is published there as ``tenant/model/vN``.
        scratch: folder for work in progress, on a disk of the control zone.
        base, profile, dtype: from the model record.
        base_digest: what the base must be, as ``Checkpoint.digest`` says it; ``None`` if any will do.
        allow_base: the operator's own list of where a base may come from: folders, ``hf://org/``,
            ``s3://bucket/prefix/``.
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
    base_digest: Digest | None = None
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


AnyTask = TypeVar("AnyTask", bound=Task)
Made = TypeVar("Made")


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
        # Nobody will take it up again, and a base that was fetched is in it.
        shutil.rmtree(task.place, ignore_errors=True)
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(REFUSED) from None


def under_grant(
    task: Task,
    token_file: Path,
    work: Callable[[KeyService], Made],
    *,
    parts: int | None = None,
    part: int | None = None,
) -> Made:
    """What ``work`` returns under a grant of this job's own; an older grant of the same job is void then.

    If fetching the base has outlasted the grant, ``work`` is called once more, under a new one.

    Args:
        task: what is to be made.
        token_file: holds an API key of the role *materializer* or a service account's token. It is
            read each time that it is needed, because a pod's is replaced while the pod runs.
        work: is given the key service as the holder of the grant sees it.
        parts: into how many the fold is divided.
        part: the one that this job folds; ``None`` for the job that finishes.

    Raises:
        SetupError: the file cannot be read, or holds no credential.
        ServiceError: the credential is not a materialiser's, or no such part is wanted.
    """

    def once() -> Made:
        grant = _grant(task, token_file, parts, part)
        with KeyService(task.keysvc, grant) as keys, reported(task, keys):
            return work(keys)

    try:
        return once()
    except errors.Conflict as error:
        if error.code != "grant_expired":
            raise
    return once()


def _grant(task: Task, token_file: Path, parts: int | None, part: int | None) -> str:
    with KeyService(task.keysvc, token_file) as keys:
        return keys.materialize(task.tenant, task.model, task.version, parts=parts, part=part).secret
