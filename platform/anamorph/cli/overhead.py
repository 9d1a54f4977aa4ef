"""``anamorph overhead``: what does encryption cost?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anamorph.cli.output import AsJson
from anamorph.errors import SetupError

if TYPE_CHECKING:
    from anamorph.canary import OverheadReport, Target
    from anamorph.wire.keyservice import KeyService


def overhead(
    prometheus: Annotated[
        str | None, typer.Option(help="URL of a Prometheus: what the continuous canary found.")
    ] = None,
    keysvc: Annotated[str | None, typer.Option(help="URL of the key service.")] = None,
    key_file: Annotated[Path | None, typer.Option(help="File with the platform's API key.")] = None,
    serve_url: Annotated[str | None, typer.Option(help="URL of Ray Serve, where the baseline is.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Tenant id.")] = None,
    model: Annotated[str | None, typer.Option(help="Model id.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Name of the baseline, if not the model's.")] = None,
    pairs: Annotated[int, typer.Option(min=2, help="Pairs of requests.")] = 20,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 64,
    output_tokens: Annotated[int, typer.Option(min=2)] = 32,
    plot: Annotated[bool, typer.Option("--plot", help="Draw both sides' medians as well.")] = False,
    png: Annotated[Path | None, typer.Option(help="Write a picture here.")] = None,
    otlp_endpoint: Annotated[str | None, typer.Option(help="Collector to push the ratios to.")] = None,
    home: Annotated[Path | None, typer.Option(help="Home of `anamorph up`.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what encryption costs on a running system: measure now, or read what the canary has found.

    Without URLs it measures the system that `anamorph up` has started. Encrypted and plaintext
    endpoint get independent random ids in turn, never one prompt to both.
    """
    if prometheus is not None:
        if plot or png is not None:
            raise SetupError("Prometheus holds medians only: --plot and --png need a measurement")
        _read(prometheus, tenant, model, as_json=as_json)
        return
    place = _place(home, keysvc, key_file, serve_url, tenant, model)
    report = _measured(place, baseline or place.model, pairs, prompt_tokens, output_tokens)
    if otlp_endpoint is not None:
        _push(report, place.tenant, otlp_endpoint)
    _print(report, plot=plot, png=png, as_json=as_json)


@dataclass(frozen=True)
class _Place:
    """What is measured, and with which credential."""

    keysvc: str
    key_file: Path
    serve_url: str
    tenant: str
    model: str


def _place(
    home: Path | None,
    keysvc: str | None,
    key_file: Path | None,
    serve_url: str | None,
    tenant: str | None,
    model: str | None,
) -> _Place:
    """As the options say it, or else what `anamorph up` has started: a key goes to its own service only."""
    from anamorph.cli.machine.home import MODEL, TENANTS, Home

    if keysvc is not None and key_file is not None and serve_url is not None:
        if tenant is None or model is None:
            raise SetupError("name --tenant and --model")
        return _Place(keysvc, key_file, serve_url, tenant, model)
    if keysvc is not None or key_file is not None or serve_url is not None:
        raise SetupError("another system needs --keysvc, --key-file and --serve-url together")
    found = Home.at(home)
    urls = found.running().urls
    return _Place(urls["keysvc"], found.platform_key, urls["serve"], tenant or TENANTS[0], model or MODEL)


def _measured(
    place: _Place, baseline: str, pairs: int, prompt_tokens: int, output_tokens: int
) -> OverheadReport:
    import httpx

    from anamorph.canary import measure
    from anamorph.wire.keyservice import KeyService

    key = place.key_file.read_text("ascii").strip()
    with KeyService(place.keysvc, key) as keys, httpx.Client(timeout=120, trust_env=False) as http:
        return measure(
            _encrypted(keys, place),
            _plaintext(keys, place.serve_url, baseline),
            model=place.model,
            vocab_size=keys.get_model(place.tenant, place.model).vocab_size,
            http=http,
            pairs=pairs,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
        )


def _encrypted(keys: KeyService, place: _Place) -> Target:
    from anamorph.canary import Target
    from anamorph.wire.keyservice import everything
    from anamorph.wire.states import State

    for version in everything(keys.list_versions, place.tenant, place.model):
        if version.state is State.ACTIVE and version.endpoint is not None:
            token = keys.inference_token(place.tenant, place.model).token
            return Target(version.endpoint, token, version.key_id)
    raise SetupError(
        f"no version of {place.tenant}/{place.model} is active: rotate its key and wait until one is"
    )


def _plaintext(keys: KeyService, serve_url: str, name: str) -> Target:
    from anamorph.canary import Target
    from anamorph.wire.serving import route_prefix

    endpoint = serve_url.rstrip("/") + route_prefix("plaintext", name, 0)
    return Target(endpoint, keys.inference_token("plaintext", name).token)


def _push(report: OverheadReport, tenant: str, endpoint: str) -> None:
    from anamorph.telemetry import setup

    telemetry = setup("anamorph-canary", otlp_endpoint=endpoint)
    report.record(telemetry.meter, tenant=tenant)
    telemetry.shutdown()


def _print(report: OverheadReport, *, plot: bool, png: Path | None, as_json: bool) -> None:
    from rich.console import Console

    from anamorph.canary import save_plot, terminal_plot

    if png is not None:
        save_plot(report, png)
    if as_json:
        typer.echo(report.to_json(), nl=False)
        return
    Console().print(report.table())
    if plot:
        typer.echo(terminal_plot(report))


def _read(prometheus: str, tenant: str | None, model: str | None, *, as_json: bool) -> None:
    import httpx
    from rich.console import Console

    from anamorph.canary.standing import standings, standings_json, standings_table

    with httpx.Client(timeout=30) as http:
        found = standings(http, prometheus, tenant=tenant, model=model)
    if as_json:
        typer.echo(standings_json(found), nl=False)
    elif not any(one.ratios for one in found):
        typer.echo("The canary has no ratio yet; is `anamorph canary watch` running?")
    else:
        Console().print(standings_table(found))
