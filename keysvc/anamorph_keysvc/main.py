"""``anamorph-keysvc``: set a home up, serve it."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
from base64 import b64encode
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
import uvicorn

from anamorph import telemetry
from anamorph.errors import AnamorphError, SetupError
from anamorph.wire.checkpoints import CheckpointKeys
from anamorph_keysvc import assemble, homes, tls
from anamorph_keysvc import config as configs
from anamorph_keysvc.app import build_app
from anamorph_keysvc.commands import database_cli
from anamorph_keysvc.homes import Home
from anamorph_keysvc.service.work import utc_now
from anamorph_keysvc.vault.commands import vault_cli

cli = typer.Typer(no_args_is_help=True, add_completion=False, help="The key service of Anamorph.")

HomeOption = Annotated[Path | None, typer.Option("--home", help="folder of the service of one machine")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="TOML file of the production service")]

cli.add_typer(vault_cli, name="vault")
cli.add_typer(database_cli, name="database")


@cli.command()
def init(home: HomeOption = None, config: ConfigOption = None) -> None:
    """Create what is missing: database, wrapping key, platform key; upgrade the schema.

    With --config: platform key and signing key, in a database that ``database upgrade`` has made.
    """
    if config is not None:
        _one_of(home, config)
        chosen = configs.load(config)
        assemble.initialise(chosen, utc_now)
        typer.echo(f"ready: {config}; the platform's API key is in {chosen.platform_key_file}")
        return
    place = _one_of(home, config)
    homes.init(Home(place), utc_now, os.urandom)
    typer.echo(f"ready: {place}; the platform's API key is in {Home(place).platform_key}")


@cli.command()
def serve(
    home: HomeOption = None,
    config: ConfigOption = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one")] = 8400,
    port_file: Annotated[Path | None, typer.Option(help="write the port here once listening")] = None,
    production: Annotated[bool, typer.Option(help="refuse what is fit for one machine only")] = False,
    tls_cert_file: Annotated[Path | None, typer.Option(help="PEM certificate chain; HTTPS with it")] = None,
    tls_key_file: Annotated[Path | None, typer.Option(help="PEM key of the certificate")] = None,
    otlp_endpoint: Annotated[str | None, typer.Option(help="collector of traces and metrics")] = None,
) -> None:
    """Serve until SIGTERM or SIGINT; requests under way are finished first."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    _one_of(home, config)
    certificate = tls.opened(tls_cert_file, tls_key_file)
    # Requests are handed between threads: with Python's 5 ms each hand-over could take as long.
    sys.setswitchinterval(0.0005)
    with ExitStack() as ends:
        if home is not None:
            ends.enter_context(Home(home).locked())
        listener = ends.enter_context(_listen(host, port))
        # uvicorn raises the signal that ended it once more: it must not end us before we are done.
        for ending in (signal.SIGTERM, signal.SIGINT):
            signal.signal(ending, _leave)
        measured = telemetry.setup("anamorph-keysvc", otlp_endpoint=otlp_endpoint)
        ends.callback(measured.shutdown)
        if home is not None:
            opened = assemble.embedded(Home(home), measured, production=production)
        else:
            opened = assemble.production(configs.load(_one_of(home, config)), measured)
        parts = ends.enter_context(opened)
        if port_file is not None:
            _announce(port_file, listener.getsockname()[1])
        server = _server(parts, measured, certificate)
        # What start-up has made stays: a collection that walked all of it again would stop every request.
        gc.collect()
        gc.freeze()
        server.run(sockets=[listener])


@cli.command(name="checkpoint-keys")
def checkpoint_keys(home: HomeOption = None, config: ConfigOption = None) -> None:
    """Print the public keys of audit checkpoints, for ``anamorph audit-log verify --public-keys``."""
    place = _one_of(home, config)
    public = assemble.checkpoint_keys(Home(place) if home is not None else configs.load(place))
    encoded = {version: b64encode(key).decode() for version, key in public.items()}
    typer.echo(CheckpointKeys(keys=encoded).model_dump_json(indent=2))


def _one_of(home: Path | None, config: Path | None) -> Path:
    """The home or the configuration, whichever was named.

    Raises:
        SetupError: none or both.
    """
    if home is not None and config is None:
        return home
    if config is not None and home is None:
        return config
    raise SetupError("name either --home (one machine) or --config (PostgreSQL and Vault)")


def _server(
    parts: assemble.Assembly, measured: telemetry.Telemetry, certificate: tls.Certificate | None
) -> uvicorn.Server:
    app = build_app(
        parts.service,
        measured,
        parts.observer,
        identity=parts.identity,
        jobs=parts.jobs,
        webhook_guard=parts.webhook_guard,
    )
    # Without the access log: it would be the longest list of tenants' model names.
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=20)
    if certificate is not None:
        certificate.serve(config)
    return uvicorn.Server(config)


def _leave(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise SetupError(f"cannot listen on {host} port {port}: {error.strerror}") from error


def _announce(path: Path, port: int) -> None:
    """Write the port in one step, so that a reader never sees half of it."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(f"{port}\n")
    draft.replace(path)


def main() -> None:
    """Run the command line; what is wrong is said in one line."""
    try:
        cli()
    except AnamorphError as error:
        typer.echo(f"anamorph-keysvc: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
