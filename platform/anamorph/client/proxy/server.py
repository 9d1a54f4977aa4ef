"""Running the proxy: one process, one event loop, a loopback socket."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import uvicorn

from anamorph.client.proxy.app import create_app
from anamorph.client.proxy.served import Models
from anamorph.client.proxy.settings import ProxySettings
from anamorph.errors import SetupError

_GRACE_S = 5


def run(settings: ProxySettings) -> None:
    """Serve until interrupted (SIGINT or SIGTERM).

    Raises:
        SetupError: a tokenizer is not the model's, or the port is taken.
        ServiceError: the key service does not answer, or does not know tenant, model or API key.
    """
    with _listen(settings) as listener:
        asyncio.run(_serve(settings, listener))


async def _serve(settings: ProxySettings, listener: socket.socket) -> None:
    # Opened here and not in the application's own start, so that a refusal reaches the caller as it is.
    models = await Models.open(settings)
    # No access log: it would say who asked when, and is of no use on one's own machine.
    config = uvicorn.Config(
        create_app(settings, models),
        access_log=False,
        log_level="warning",
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=_GRACE_S,
    )
    await _Server(config, settings.port_file).serve(sockets=[listener])


class _Server(uvicorn.Server):
    """Says in a file where it listens, once it does."""

    def __init__(self, config: uvicorn.Config, port_file: Path | None) -> None:
        super().__init__(config)
        self._port_file = port_file

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then write the file."""
        await super().startup(sockets)
        if self.started and self._port_file is not None and sockets:
            _write_port(self._port_file, sockets[0].getsockname()[1])


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
