"""``anamorph parts``: a materialisation by several jobs, such as the pods of an Indexed Job.

``parts fold`` makes the part of its index in a folder that all jobs share; when all parts are
there, ``parts finish`` signs, publishes, compares, probes and reports. The task comes from a
file and holds no secret. Each job asks the key service for a grant of its own with the
credential in ``--token-file``: a service account's token, or an API key of the role
*materializer*. So nobody hands grants around, and a job that is started again asks again.
Exit codes are those of ``anamorph materialize``.
"""

from __future__ import annotations

from typing import Annotated

import typer
from pydantic import Field

from anamorph.cli import materialize
from anamorph.cli import task as tasks
from anamorph.cli.machine.signals import end_at_once
from anamorph.cli.task import Task, TaskFile, TokenFile
from anamorph.wire.admin import MOST_PARTS

app = typer.Typer(help="Materialise in parts, one job for each.", no_args_is_help=True)

INDEX_VARIABLE = "JOB_COMPLETION_INDEX"
"""What Kubernetes tells a pod of an Indexed Job."""


class PartsTask(Task):
    """What is to be made in ``parts`` parts, 0 to ``parts`` - 1; the same for every job."""

    parts: int = Field(ge=1, le=MOST_PARTS)


@app.command()
def fold(
    task: TaskFile,
    token_file: TokenFile,
    index: Annotated[int, typer.Option("--index", min=0, envvar=INDEX_VARIABLE, help="Which part.")],
) -> None:
    """Fold one part; started again, it goes on from its finished files."""
    end_at_once()
    wanted = tasks.read(PartsTask, task.read_bytes(), str(task))
    if index >= wanted.parts:
        raise typer.BadParameter(
            f"part {index} of {wanted.parts}: parts are 0 to {wanted.parts - 1}", param_hint="--index"
        )
    written = tasks.under_grant(
        wanted,
        token_file,
        lambda keys: materialize.run_part(wanted, keys, index, wanted.parts),
        parts=wanted.parts,
        part=index,
    )
    typer.echo(f"part {index} of {wanted.parts}: {written} files written")


@app.command()
def finish(task: TaskFile, token_file: TokenFile) -> None:
    """Publish the replica whose parts are all there, and report it."""
    end_at_once()
    wanted = tasks.read(PartsTask, task.read_bytes(), str(task))
    made = tasks.under_grant(
        wanted,
        token_file,
        lambda keys: materialize.run(wanted, keys, parts=wanted.parts),
        parts=wanted.parts,
    )
    typer.echo(made.replica)
