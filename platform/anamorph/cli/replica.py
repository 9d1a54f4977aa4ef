"""``anamorph replica``: check a replica against its trust anchor."""

from __future__ import annotations

from base64 import b64decode
from typing import Annotated

import typer

from anamorph.cli.output import AsJson, show
from anamorph.errors import InvalidKey

app = typer.Typer(help="Check a replica against its trust anchor.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep `verify` a subcommand: more verbs follow."""


@app.command()
def verify(
    location: Annotated[str, typer.Argument(help="Folder or URL of the replica.")],
    public_key: Annotated[
        str | None,
        typer.Option("--public-key", help="Base64 public key of the version record: the trust anchor."),
    ] = None,
    key_id: Annotated[str | None, typer.Option(help="The key id it must be made with.")] = None,
    manifest_sha256: Annotated[str | None, typer.Option(help="SHA-256 its manifest must have.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check every byte of a replica; exit 0 only if all of it is as signed."""
    from anamorph.replica import verify as verify_replica

    if public_key is None:
        # Its own manifest is no witness: whoever alters a replica can sign it again.
        typer.echo(
            "not verified: without a trust anchor anyone could have signed this;"
            " pass --public-key from the key service's version record",
            err=True,
        )
        raise typer.Exit(2)
    manifest = verify_replica(location, _anchor(public_key), key_id=key_id, manifest_sha256=manifest_sha256)
    fields = {
        "verified": True,
        "key_id": manifest.key_id,
        "profile": manifest.profile,
        "table": manifest.table,
        "files": len(manifest.files),
        "bytes": sum(entry.size for entry in manifest.files.values()),
        "manifest_sha256": manifest.sha256(),
    }
    show(fields, as_json=as_json)


def _anchor(text: str) -> bytes:
    try:
        return b64decode(text, validate=True)
    except ValueError:
        raise InvalidKey("--public-key is base64 of 32 bytes, as in the version record") from None
