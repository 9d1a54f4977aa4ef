"""``anamorph-keysvc``: set a home up, serve it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
import uvicorn

from anamorph import telemetry
from anamorph.errors import AnamorphError, SetupError
from anamorph_keysvc import home as homes
from anamorph_keysvc.app import build_app
from anamorph_keysvc.home import Home
from anamorph_keysvc.service.work import Service, utc_now

cli = typer.Typer(no_args_is_help=True, add_completion=False, help="The key service of Anamorph.")

HomeOption = Annotated[Path, typer.Option("--home", help="folder of the service, its owner's alone")]


@cli.command()
def init(home: HomeOption) -> None:
    """Create database, wrapping key and platform key where missing; upgrade the schema."""
    homes.init(Home(home), utc_now, os.urandom)
    typer.echo(f"ready: {home}; the platform's API key is in {Home(home).platform_key}")


@cli.command()
def serve(
    home: HomeOption,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one")] = 8400,
    port_file: Annotated[Path | None, typer.Option(help="write the port here once listening")] = None,
    production: Annotated[bool, typer.Option(help="refuse what is fit for one machine only")] = False,
    otlp_endpoint: Annotated[str | None, typer.Option(help="collector of traces and metrics")] = None,
) -> None:
    """Serve until SIGTERM or SIGINT; requests under way are finished first."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    place = Home(home)
    with place.locked(), _listen(host, port) as listener, ExitStack() as ends:
        # uvicorn raises the signal that ended it once more: it must not end us before we are done.
        for ending in (signal.SIGTERM, signal.SIGINT):
            signal.signal(ending, _leave)
        service = homes.open_service(place, production=production, clock=utc_now, entropy=os.urandom)
        ends.callback(service.database.close)
        measured = telemetry.setup("anamorph-keysvc", otlp_endpoint=otlp_endpoint)
        ends.callback(measured.shutdown)
        if port_file is not None:
            _announce(port_file, listener.getsockname()[1])
        _server(service, measured).run(sockets=[listener])


def _server(service: Service, measured: telemetry.Telemetry) -> uvicorn.Server:
    # Without the access log: it would be the longest list of tenants' model names.
    config = uvicorn.Config(
        build_app(service, measured), log_config=None, access_log=False, timeout_graceful_shutdown=20
    )
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
