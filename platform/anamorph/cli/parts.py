"""``anamorph parts``: a materialisation by several jobs, such as the pods of an Indexed Job.

``parts fold`` makes the part of its index in a folder that all jobs share; when all parts are
there, ``parts finish`` signs, publishes, compares, probes and reports. The task comes from a
file and holds no secret. Each job asks the key service for a grant of its own with the
credential in ``--token-file``: a service account's token, or an API key of the role
*materializer*. So nobody hands grants around, and a job that is started again asks again.
Exit codes are those of ``anamorph materialize``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field

from anamorph.cli import materialize
from anamorph.wire.admin import MOST_PARTS
from anamorph.wire.keyservice import KeyService

app = typer.Typer(help="Materialise in parts, one job for each.", no_args_is_help=True)

INDEX_VARIABLE = "JOB_COMPLETION_INDEX"
"""What Kubernetes tells a pod of an Indexed Job."""


class PartsTask(materialize.Task):
    """What is to be made in ``parts`` parts, 0 to ``parts`` - 1; the same for every job."""

    parts: int = Field(ge=1, le=MOST_PARTS)


TaskFile = Annotated[
    Path, typer.Option("--task", help="JSON file: what is to be made, and in how many parts.")
]
TokenFile = Annotated[Path, typer.Option("--token-file", help="Credential of a materialiser.")]


@app.command()
def fold(
    task: TaskFile,
    token_file: TokenFile,
    index: Annotated[int, typer.Option("--index", min=0, envvar=INDEX_VARIABLE, help="Which part.")],
) -> None:
    """Fold one part; started again, it goes on from its finished files."""
    wanted = materialize.read(PartsTask, task.read_bytes(), str(task))
    if index >= wanted.parts:
        raise typer.BadParameter(
            f"part {index} of {wanted.parts}: parts are 0 to {wanted.parts - 1}", param_hint="--index"
        )
    grant = _grant(wanted, token_file, index)
    with KeyService(wanted.keysvc, grant) as keys, materialize.reported(wanted, keys):
        written = materialize.run_part(wanted, keys, index, wanted.parts)
    typer.echo(f"part {index} of {wanted.parts}: {written} files written")


@app.command()
def finish(task: TaskFile, token_file: TokenFile) -> None:
    """Publish the replica whose parts are all there, and report it."""
    wanted = materialize.read(PartsTask, task.read_bytes(), str(task))
    with KeyService(wanted.keysvc, _grant(wanted, token_file)) as keys, materialize.reported(wanted, keys):
        made = materialize.run(wanted, keys, parts=wanted.parts)
    typer.echo(made.replica)


def _grant(task: PartsTask, token_file: Path, part: int | None = None) -> str:
    """A grant of this job's own; an older one of the same job is void from now on.

    Raises:
        SetupError: the file cannot be read, or holds no credential.
        ServiceError: the credential is not a materialiser's, or no such part is wanted.
    """
    with KeyService(task.keysvc, token_file) as keys:
        return keys.materialize(task.tenant, task.model, task.version, parts=task.parts, part=part).secret
