"""Running the proxy: one process, one event loop, a loopback socket."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import uvicorn

from anamorph.client.proxy.app import create_app
from anamorph.client.proxy.settings import ProxySettings
from anamorph.errors import SetupError


def run(settings: ProxySettings) -> None:
    """Serve until interrupted (SIGINT or SIGTERM).

    Raises:
        SetupError: a tokenizer is not the model's, the port is taken, or the key
            service could not be asked; the log says which.
    """
    with _listen(settings) as listener:
        asyncio.run(_serve(settings, listener))


async def _serve(settings: ProxySettings, listener: socket.socket) -> None:
    app = create_app(settings)
    # No access log: it would say who asked when, and is of no use on one's own machine.
    config = uvicorn.Config(app, access_log=False, log_level="warning", lifespan="on", server_header=False)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started and settings.port_file is not None:
        _write_port(settings.port_file, listener.getsockname()[1])
    await serving
    if not server.started:
        raise SetupError("the proxy did not start; the lines above say why")


def _listen(settings: ProxySettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host.strip("[]"), settings.port), family=family)
    except OSError as error:
        raise SetupError(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror}); choose another port"
        ) from None


def _write_port(path: Path, port: int) -> None:
    """Appear at once and whole: whoever waits for the file may read it as soon as it is there."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    staged.write_text(f"{port}\n", encoding="ascii")
    staged.replace(path)
