"""``anamorph-operator``: the reconciler as a process."""

from __future__ import annotations

import asyncio
import json
import logging
import shlex
import signal
import socket
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import httpx
import typer
import yaml
from pydantic import ValidationError

from anamorph.errors import SetupError
from anamorph.wire.keyservice import AsyncKeyService
from anamorph.wire.serving import Cache, PoolSettings
from anamorph_operator.local import LocalJobs, Workplace
from anamorph_operator.probe import Prober, Tokens
from anamorph_operator.processes import DEFAULT_COMMAND, Processes
from anamorph_operator.ray_serve import RayServe
from anamorph_operator.reconciler import Reconciler, Settings
from anamorph_operator.state import Baseline

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
_DEFAULT_CONTEXT = 2048


@app.callback()
def _operator() -> None:
    """Keep replicas, served applications and key versions in step."""


@app.command()
def local(
    keysvc: Annotated[str, typer.Option(help="URL of the key service.")],
    key_file: Annotated[Path, typer.Option(help="File with a platform API key.", exists=True)],
    ray_dashboard: Annotated[str, typer.Option(help="URL of Ray's dashboard.")],
    serve_url: Annotated[str, typer.Option(help="URL where Ray Serve listens.")],
    store: Annotated[str, typer.Option(help="Folder or URL where replicas are published.")],
    scratch: Annotated[Path, typer.Option(help="Folder for work in progress.")],
    ray_token_file: Annotated[Path | None, typer.Option(help="File with Ray's token.")] = None,
    baseline: Annotated[
        list[str], typer.Option(help="NAME=FOLDER[,dtype=…][,engine=…][,context=N]; repeatable.")
    ] = [],  # noqa: B006 - typer copies it
    allow_base: Annotated[
        list[str], typer.Option(help="Where bases may come from: a folder, hf://org/; repeatable.")
    ] = [],  # noqa: B006
    interval: Annotated[float, typer.Option(help="Seconds between two turns.", min=0.05)] = 1.0,
    materializer: Annotated[str | None, typer.Option(help="Command of the materialisation job.")] = None,
    otlp_endpoint: Annotated[str | None, typer.Option(help="OTLP collector for the engines.")] = None,
    pool: Annotated[
        list[str], typer.Option(help="NAME=slots=4,host_bytes=…: settings of a pool; repeatable.")
    ] = [],  # noqa: B006
    cache: Annotated[Path | None, typer.Option(help="Folder on each node for fetched replicas.")] = None,
    cache_bytes: Annotated[int | None, typer.Option(help="Most bytes that it takes.", min=1)] = None,
) -> None:
    """Run on one machine: jobs as processes, serving by a local Ray."""
    _log_to_standard_error()
    settings = Settings(
        serve_url=serve_url,
        store=store,
        baselines=tuple(parse_baseline(text) for text in baseline),
        allow_base=tuple(allow_base),
        interval_s=interval,
        otlp_endpoint=otlp_endpoint,
        pools=dict(parse_pool(text) for text in pool),
        cache=_cache(cache, cache_bytes),
    )
    place = Workplace(keysvc, store, scratch, tuple(allow_base))
    command = tuple(shlex.split(materializer)) if materializer else DEFAULT_COMMAND
    key, ray_token = _secret(key_file), _secret(ray_token_file) if ray_token_file else None
    asyncio.run(_run(settings, place, key, ray_dashboard, ray_token, command))


@app.command()
def kubernetes(
    config: Annotated[Path, typer.Option(help="File with the operator's options, YAML.", exists=True)],
    kubeconfig: Annotated[
        Path | None, typer.Option(help="How to reach the API server; default: the pod's service account.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of this replica; default: the host's.")] = None,
) -> None:
    """Run in a Kubernetes cluster: keep what EncryptedModels and ServingClusters say."""
    # Imported here: one machine needs neither kopf nor the client.
    from anamorph_operator.kubernetes.handlers import operate
    from anamorph_operator.kubernetes.options import read_options
    from anamorph_operator.kubernetes.process import run

    _log_to_standard_error()
    run(read_options(config), kubeconfig, name or socket.gethostname(), operate)


@app.command()
def crds() -> None:
    """Print the custom resource definitions and the admission policy, as YAML documents."""
    from anamorph_operator.kubernetes.resources.admission import binding, policy
    from anamorph_operator.kubernetes.resources.definition import KINDS, definition

    documents = [*(definition(kind) for kind in KINDS), policy(), binding()]
    typer.echo(yaml.safe_dump_all(documents, sort_keys=False, width=100), nl=False)


def _log_to_standard_error() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    # httpx logs every request at INFO.
    logging.getLogger("httpx").setLevel(logging.WARNING)


def parse_baseline(text: str) -> Baseline:
    """Read ``NAME=FOLDER[,dtype=…][,engine=…][,context=N]``.

    Raises:
        SetupError: another form, or an unknown option.
    """
    place, *extra = text.split(",")
    name, separator, folder = place.partition("=")
    options = dict(item.partition("=")[::2] for item in extra)
    if not separator or not name or not folder or options.keys() - {"dtype", "engine", "context"}:
        raise SetupError("a baseline reads NAME=FOLDER[,dtype=float32][,engine=torch][,context=2048]")
    context = int(options.pop("context", 0)) or _context_of(Path(folder))
    return Baseline(name, str(Path(folder).absolute()), context, **options)  # type: ignore[arg-type]


def parse_pool(text: str) -> tuple[str, dict[str, str]]:
    """Read ``NAME=SETTING=VALUE,…``, settings as in ``PoolSettings``.

    Raises:
        SetupError: another form, or a setting that there is not.
    """
    name, _, rest = text.partition("=")
    chosen = dict(item.partition("=")[::2] for item in rest.split(",") if item)
    try:
        PoolSettings.model_validate({"context_length": 1, **chosen, "pool": name})
    except ValidationError as error:
        [first, *_] = error.errors()
        field = ".".join(map(str, first["loc"]))
        raise SetupError(
            f"--pool {name}: {field}: {first['msg']}; it reads NAME=slots=4,num_blocks=512"
        ) from None
    return name, chosen


def _cache(folder: Path | None, limit_bytes: int | None) -> Cache | None:
    chosen = {"folder": folder and str(folder.absolute()), "limit_bytes": limit_bytes}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    return Cache.model_validate(chosen) if chosen else None


def _context_of(folder: Path) -> int:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return _DEFAULT_CONTEXT
    return int(config.get("max_position_embeddings") or _DEFAULT_CONTEXT)


async def _run(
    settings: Settings,
    place: Workplace,
    key: str,
    dashboard: str,
    ray_token: str | None,
    command: tuple[str, ...],
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        keys = await stack.enter_async_context(AsyncKeyService(place.keysvc, key))
        ray = await stack.enter_async_context(_dashboard_client(dashboard, ray_token))
        # Probes wait for a whole answer; usage readings set their own, short timeout.
        engines = await stack.enter_async_context(httpx.AsyncClient(timeout=120, trust_env=False))
        prober = Prober(engines, Tokens(keys.inference_token, _utc_now), _utc_now)
        jobs = LocalJobs(place, keys, Processes(command, _utc_now))
        serve = RayServe(ray, settings.serve_url)
        await Reconciler(settings, keys, serve, jobs, prober, _utc_now).run(stop)


def _secret(path: Path) -> str:
    return path.read_text().strip()


def _dashboard_client(url: str, token: str | None) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=30, trust_env=False)


def _utc_now() -> datetime:
    return datetime.now(UTC)


def main() -> None:
    """Entry point of ``anamorph-operator``."""
    app()


if __name__ == "__main__":
    main()
