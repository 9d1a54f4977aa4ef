"""``anamorph fold``: make an encrypted replica of a model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, cast

import typer

from anamorph.cli.output import AsJson, show
from anamorph.wire.admin import Profile

_SIZE = re.compile(r"(\d+)([KMGT]?)B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def _bytes(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None or int(match[1]) == 0:
        raise typer.BadParameter("a size reads 500MB, 5GB or a number of bytes")
    return int(match[1]) * _UNITS[match[2].upper()]


def fold(
    base: Annotated[Path, typer.Argument(help="Folder of the plaintext checkpoint.")],
    out: Annotated[Path, typer.Argument(help="New folder for the replica.")],
    key: Annotated[Path, typer.Option("--key", help="Key file of `anamorph key generate`.")],
    profile: Annotated[
        str, typer.Option(help="rotate, or permute: weights moved, never rounded.")
    ] = "rotate",
    device: Annotated[str, typer.Option(help="torch device of the products.")] = "cpu",
    max_shard_size: Annotated[
        int, typer.Option(parser=_bytes, metavar="SIZE", help="Largest shard, such as 5GB.")
    ] = 2**29,
    as_json: AsJson = False,
) -> None:
    """Make an encrypted replica of a model; a killed fold resumes when called again."""
    from rich.progress import Progress

    from anamorph.keys import TenantKey
    from anamorph.pipeline import fold as fold_replica

    if profile not in ("rotate", "permute"):
        raise typer.BadParameter("--profile is rotate or permute")
    with Progress(transient=True) as bars:
        task = bars.add_task("fold", total=1.0)
        manifest = fold_replica(
            base,
            out,
            TenantKey.load(key),
            cast("Profile", profile),
            device=device,
            max_shard_size=max_shard_size,
            progress=lambda phase, done: bars.update(task, description=phase, completed=done),
        )
    show(
        {"replica": str(out), "key_id": manifest.key_id, "manifest_sha256": manifest.sha256()},
        as_json=as_json,
    )
