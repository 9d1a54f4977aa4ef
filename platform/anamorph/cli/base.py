"""``anamorph base``: plaintext checkpoints, from which replicas are made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anamorph.cli.output import AsJson, show

if TYPE_CHECKING:
    from anamorph.checkpoint import Checkpoint

app = typer.Typer(help="Plaintext checkpoints, from which replicas are made.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="Folder of the checkpoint; its tokenizer may be there.")]


@app.command("show")
def show_base(folder: Folder, as_json: AsJson = False) -> None:
    """Show what a model's record says of a base: digest, sizes, digests of tokenizer and chat template."""
    from anamorph.checkpoint import Checkpoint

    show(_described(Checkpoint.open(folder)), as_json=as_json)


@app.command()
def push(
    folder: Folder,
    url: Annotated[str, typer.Argument(help="New folder of an object store: s3://bucket/path.")],
    as_json: AsJson = False,
) -> None:
    """Copy what a fold reads of a base into an object store, and show it; nothing is overwritten.

    Endpoint and credentials are those of the store's client: AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID, …
    """
    from anamorph.checkpoint import Checkpoint
    from anamorph.replica.push import push_plain

    base = Checkpoint.open(folder)
    described = _described(base)
    show({"uri": push_plain(base.folder, base.files, url), **described}, as_json=as_json)


def _described(base: Checkpoint) -> dict[str, Any]:
    """Fields that a model is registered with; what the folder does not say is left out."""
    config = {
        "vocab_size": base.config.get("vocab_size"),
        "context_length": base.config.get("max_position_embeddings"),
    }
    fields = {"digest": base.digest(), **config, **_tokenizer(base.folder)}
    return {name: value for name, value in fields.items() if value is not None}


def _tokenizer(folder: Path) -> dict[str, str | None]:
    if not (folder / "tokenizer.json").exists():
        return {}
    from anamorph.client.tokenizer import chat_template_digest, tokenizer_digest

    return {
        "tokenizer_digest": tokenizer_digest(folder),
        "chat_template_digest": chat_template_digest(folder),
    }
