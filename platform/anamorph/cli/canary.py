"""``anamorph canary``: what encryption costs, measured on the running system."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anamorph.cli.output import AsJson
from anamorph.errors import SetupError

if TYPE_CHECKING:
    from anamorph.canary import OverheadReport, Target
    from anamorph.wire.keyservice import KeyService


def canary(
    keysvc: Annotated[str, typer.Option(help="URL of the key service.")],
    key_file: Annotated[Path, typer.Option(help="File with the platform's API key.")],
    serve_url: Annotated[str, typer.Option(help="URL of Ray Serve, where the baseline is.")],
    tenant: Annotated[str, typer.Option(help="Tenant id.")],
    model: Annotated[str, typer.Option(help="Model id.")],
    baseline: Annotated[str | None, typer.Option(help="Name of the baseline, if not the model's.")] = None,
    pairs: Annotated[int, typer.Option(min=2, help="Pairs of requests.")] = 20,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 64,
    output_tokens: Annotated[int, typer.Option(min=2)] = 32,
    plot: Annotated[Path | None, typer.Option(help="Write a picture here (PNG).")] = None,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(help="Collector to push the ratios to (OTLP over HTTP)."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure encrypted against plaintext serving, in turn, with random ids and never one prompt to both."""
    import httpx
    from rich.console import Console

    from anamorph.canary import measure, save_plot, terminal_plot
    from anamorph.wire.keyservice import KeyService

    with KeyService(keysvc, key_file.read_text("ascii").strip()) as keys, httpx.Client(timeout=120) as http:
        report = measure(
            _encrypted(keys, tenant, model),
            _plaintext(keys, serve_url, baseline or model),
            model=model,
            vocab_size=keys.get_model(tenant, model).vocab_size,
            http=http,
            pairs=pairs,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
        )
    if plot is not None:
        save_plot(report, plot)
    if otlp_endpoint is not None:
        _push(report, tenant, otlp_endpoint)
    if as_json:
        typer.echo(report.to_json(), nl=False)
    else:
        Console().print(report.table())
        typer.echo(terminal_plot(report))


def _push(report: OverheadReport, tenant: str, endpoint: str) -> None:
    from anamorph.telemetry import setup

    telemetry = setup("anamorph-canary", otlp_endpoint=endpoint)
    report.record(telemetry.meter, tenant=tenant)
    telemetry.shutdown()


def _encrypted(keys: KeyService, tenant: str, model: str) -> Target:
    from anamorph.canary import Target
    from anamorph.wire.keyservice import everything
    from anamorph.wire.states import State

    for version in everything(keys.list_versions, tenant, model):
        if version.state is State.ACTIVE and version.endpoint is not None:
            token = keys.inference_token(tenant, model).token
            return Target(version.endpoint, token, version.key_id)
    raise SetupError(f"no version of {tenant}/{model} is active: rotate its key and wait until one is")


def _plaintext(keys: KeyService, serve_url: str, name: str) -> Target:
    from anamorph.canary import Target
    from anamorph.wire.serving import route_prefix

    endpoint = serve_url.rstrip("/") + route_prefix("plaintext", name, 0)
    return Target(endpoint, keys.inference_token("plaintext", name).token)
