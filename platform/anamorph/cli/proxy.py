"""``anamorph proxy``: the OpenAI API on this machine, for models served encrypted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def proxy(
    keysvc: Annotated[str, typer.Option(help="URL of the key service.")],
    tenant: Annotated[str, typer.Option(help="Tenant id.")],
    api_key_file: Annotated[Path, typer.Option(help="File with the tenant's API key of role client.")],
    model: Annotated[
        list[str], typer.Option(metavar="NAME=FOLDER", help="A model and its tokenizer's folder; repeatable.")
    ],
    host: Annotated[str, typer.Option(help="Loopback address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = 8600,
    port_file: Annotated[Path | None, typer.Option(help="Gets the port once the proxy answers.")] = None,
    local_api_key_file: Annotated[
        Path | None, typer.Option(help="If given, callers must send the key in it as bearer token.")
    ] = None,
    otlp_endpoint: Annotated[str | None, typer.Option(help="Where traces go.")] = None,
) -> None:
    """Serve chat and completions on localhost: text on this side, encrypted token ids on the other."""
    from anamorph.client.proxy import ProxySettings, run

    settings = ProxySettings(
        keysvc_url=keysvc,
        tenant=tenant,
        api_key_file=api_key_file,
        models=dict(map(_named_folder, model)),
        host=host,
        port=port,
        port_file=port_file,
        local_api_key=local_api_key_file.read_text("ascii").strip() if local_api_key_file else None,
        otlp_endpoint=otlp_endpoint,
    )
    run(settings)


def _named_folder(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise typer.BadParameter("--model reads NAME=FOLDER")
    return name, Path(folder)
