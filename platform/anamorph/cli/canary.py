"""``anamorph canary``: measures what encryption costs, for ever, in low volume."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from anamorph.errors import SetupError

app = typer.Typer(
    help="Measure encrypted against plaintext serving, continuously.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def watch(
    keysvc: Annotated[str, typer.Option(help="URL of the key service.")],
    key_file: Annotated[Path, typer.Option(help="File with a credential of the platform; read anew.")],
    serve_url: Annotated[str, typer.Option(help="URL of Ray Serve, where the baselines are.")],
    baseline: Annotated[
        list[str], typer.Option(help="MODEL=NAME: another baseline than the model's name; repeatable.")
    ] = [],  # noqa: B006 - typer copies it
    every: Annotated[float, typer.Option(min=0.01, help="Seconds between two pairs of one version.")] = 120,
    length: Annotated[list[int], typer.Option(min=1, help="Prompt lengths in ids, in turn.")] = [16, 64, 256],  # noqa: B006
    output_tokens: Annotated[int, typer.Option(min=2, help="Ids of every answer.")] = 16,
    window: Annotated[float, typer.Option(min=1, help="Seconds that a ratio looks back.")] = 12 * 3600,
    versions: Annotated[int, typer.Option(min=1, help="Versions that are measured at a time.")] = 20,
    otlp_endpoint: Annotated[str | None, typer.Option(help="Collector of the metrics.")] = None,
) -> None:
    """Send pairs of random requests until SIGTERM; versions that are not loaded anyway are left alone."""
    import httpx

    from anamorph.canary import Baselines, Watch, WatchSettings
    from anamorph.telemetry import setup
    from anamorph.wire import trust
    from anamorph.wire.keyservice import KeyService

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # every request at INFO
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    settings = WatchSettings(
        every_s=every,
        lengths=tuple(length),
        output_tokens=output_tokens,
        window_s=window,
        most_versions=versions,
    )
    baselines = Baselines(serve_url, dict(_named(text) for text in baseline))
    observed = setup("anamorph-canary", otlp_endpoint=otlp_endpoint)
    try:
        engines = httpx.Client(timeout=120, trust_env=False, verify=trust.context())
        with KeyService(keysvc, key_file) as keys, engines as http:
            Watch(keys, http, baselines, observed, settings).run(stop)
    finally:
        observed.shutdown()


def _named(text: str) -> tuple[str, str]:
    model, separator, name = text.partition("=")
    if not separator or not model or not name:
        raise SetupError("a baseline reads MODEL=NAME")
    return model, name


@app.command()
def twin(
    source: Annotated[Path, typer.Argument(help="Folder of the private base, or of its replica.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
) -> None:
    """Make a checkpoint of the same shape with random weights, to serve as baseline of a private base."""
    from anamorph.canary import twin as make_twin

    make_twin(source, out)
    typer.echo(f"{out}: name it to the operator as --baseline MODEL={out}")
