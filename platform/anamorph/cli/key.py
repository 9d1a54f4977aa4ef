"""``anamorph key``: make a tenant key, or show what is public about one."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anamorph.cli.output import AsJson, show

if TYPE_CHECKING:
    from anamorph.keys import TenantKey

app = typer.Typer(help="Make a tenant key, or show what is public about one.", no_args_is_help=True)


@app.command()
def generate(
    tenant: str,
    model: str,
    version: int,
    out: Annotated[Path, typer.Option("--out", help="New file, readable by its owner only.")],
    as_json: AsJson = False,
) -> None:
    """Draw a random key and save it; an existing file is never overwritten."""
    from anamorph.keys import TenantKey

    key = TenantKey.generate(tenant, model, version)
    key.save(out)
    show(_public(key), as_json=as_json)


@app.command("show")
def show_key(file: Path, as_json: AsJson = False) -> None:
    """Show a key's id, check values and public key; nothing secret."""
    from anamorph.keys import TenantKey

    show(_public(TenantKey.load(file)), as_json=as_json)


def _public(key: TenantKey) -> dict[str, Any]:
    return {
        "key_id": key.id,
        "kcv": key.kcv,
        "vocab_kcv": key.vocab_kcv,
        "public_key": b64encode(key.public_key()).decode("ascii"),
    }
