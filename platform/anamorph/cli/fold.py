"""``anamorph fold``: make an encrypted replica of a model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from anamorph.cli.output import AsJson, show
from anamorph.wire.admin import Profile

_SIZE = re.compile(r"(\d+)(?:([KMGT])(I?)B?)?", re.IGNORECASE)


def fold(
    base: Annotated[
        str, typer.Argument(help="The plaintext checkpoint: a folder, or hf://org/name[@revision].")
    ],
    out: Annotated[Path, typer.Argument(help="New folder for the replica.")],
    key: Annotated[Path, typer.Option("--key", help="Key file of `anamorph key generate`.")],
    profile: Annotated[Profile, typer.Option(help="permute only moves weights, never rounds.")] = "rotate",
    device: Annotated[str, typer.Option(help="torch device of the products.")] = "cpu",
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Such as 5GB or 512MiB.")] = "512MiB",
    workers: Annotated[int, typer.Option(min=1, help="Processes; the bytes are the same.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Make an encrypted replica of a model; a killed fold resumes when called again."""
    from rich.console import Console
    from rich.progress import Progress

    from anamorph.checkpoint.source import local_base
    from anamorph.keys import TenantKey
    from anamorph.pipeline import fold as fold_replica

    shard_bytes = _bytes(max_shard_size)
    tenant_key = TenantKey.load(key)
    # Before the bars below: a download draws its own.
    folder = local_base(base)
    with Progress(console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("fold", total=1.0)
        manifest = fold_replica(
            folder,
            out,
            tenant_key,
            profile,
            device=device,
            max_shard_size=shard_bytes,
            workers=workers,
            progress=lambda phase, done: bars.update(task, description=phase, completed=done),
        )
    show(
        {"replica": str(out), "key_id": manifest.key_id, "manifest_sha256": manifest.sha256()},
        as_json=as_json,
    )


def _bytes(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    size = _number(match) if match else 0
    if size == 0:
        raise typer.BadParameter(
            "a size reads 500MB, 512MiB or a number of bytes", param_hint="--max-shard-size"
        )
    return size


def _number(match: re.Match[str]) -> int:
    exponent = " KMGT".index((match[2] or " ").upper())
    return int(match[1]) * int((1024 if match[3] else 1000) ** exponent)
