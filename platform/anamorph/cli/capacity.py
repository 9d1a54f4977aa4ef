"""``anamorph capacity``: what the cluster has, what stands on it, and whether another model fits."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from anamorph.cli.machine.home import Home, HomeOption
from anamorph.cli.output import AsJson, show
from anamorph.errors import SetupError
from anamorph.serve.cluster.local import RayProcess
from anamorph.serve.cluster.placement import (
    Demand,
    DoesNotFit,
    Node,
    Room,
    demand_of,
    fits,
    left_over,
    nodes_of,
    without_memory,
)
from anamorph.serve.cluster.sizing import read_size
from anamorph.wire.admin import Dtype
from anamorph.wire.serving import APP_IMPORT_PATH, POOL_IMPORT_PATH, EngineSettings, PoolSettings

_SETTINGS: dict[str, type[EngineSettings | PoolSettings]] = {
    APP_IMPORT_PATH: EngineSettings,
    POOL_IMPORT_PATH: PoolSettings,
}


def capacity(
    ray_dashboard: Annotated[str | None, typer.Option(help="URL of Ray's dashboard.")] = None,
    ray_token_file: Annotated[Path | None, typer.Option(help="File with Ray's token.")] = None,
    base: Annotated[Path | None, typer.Option(help="Folder of a model: would it fit?")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Type that it would be computed in.")] = "auto",
    tensor_parallel: Annotated[int, typer.Option(min=1)] = 1,
    pipeline_parallel: Annotated[int, typer.Option(min=1)] = 1,
    num_gpus: Annotated[float, typer.Option(min=0, help="GPUs per rank.")] = 0,
    home: HomeOption = None,
    as_json: AsJson = False,
) -> None:
    """Show nodes and what is placed on them; with --base, whether another model fits (exit code 1: no).

    Without a dashboard it looks at the system that `anamorph up` has started.
    """
    cluster, placed = _look(ray_dashboard, ray_token_file, home)
    answer: dict[str, Any] = {"nodes": _nodes(cluster, placed), "applications": [asdict(d) for d in placed]}
    if base is not None:
        settings = {"tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel}
        wanted = _wanted(base, dtype, {**settings, "num_gpus": num_gpus}, cluster)
        answer["wanted"] = _verdict(cluster, placed, wanted)
    if as_json:
        show(answer, as_json=True)
    else:
        _print(answer)
    if base is not None and not answer["wanted"]["fits"]:
        raise typer.Exit(1)


def _look(
    url: str | None, token_file: Path | None, home: Path | None
) -> tuple[tuple[Node, ...], list[Demand]]:
    if url is None:
        ray = RayProcess.load(Home.at(home).ray)
        if ray is None or not ray.alive():
            raise SetupError("nothing runs here: start it with 'anamorph up', or name --ray-dashboard")
        url, headers = ray.dashboard_url, ray.headers()
    else:
        headers = {} if token_file is None else {"Authorization": f"Bearer {token_file.read_text().strip()}"}
    with httpx.Client(base_url=url, headers=headers, timeout=30, trust_env=False) as http:
        nodes = _get(http, "/api/v0/nodes?limit=10000&detail=true")
        return nodes_of(nodes), _placed(_get(http, "/api/serve/applications/"))


def _get(http: httpx.Client, path: str) -> Any:
    try:
        response = http.get(path)
    except httpx.TransportError as error:
        raise SetupError(f"Ray's dashboard does not answer: {type(error).__name__}") from None
    if response.status_code != 200:
        raise SetupError(f"Ray's dashboard answers {response.status_code}; does --ray-token-file fit?")
    return response.json()


def _placed(answer: dict[str, Any]) -> list[Demand]:
    """What each application of ours reserves at all times."""
    found = []
    for name, details in answer["applications"].items():
        config = details.get("deployed_app_config") or {}
        settings = _SETTINGS.get(config.get("import_path", ""))
        try:
            found += [] if settings is None else [demand_of(name, settings.model_validate(config["args"]))]
        except ValidationError:  # of another release, or of somebody else
            continue
    return found


def _nodes(cluster: tuple[Node, ...], placed: list[Demand]) -> list[dict[str, Any]]:
    left = left_over(cluster, placed)
    return [{"name": n.name, "has": asdict(n.room), "left": asdict(left[n.name])} for n in cluster]


def _wanted(base: Path, dtype: Dtype, chosen: dict[str, Any], cluster: tuple[Node, ...]) -> Demand:
    size = read_size(base, dtype)
    if size is None:
        raise SetupError(f"{base} holds no config.json and safetensors files: its size cannot be told")
    ranks = chosen["tensor_parallel"] * chosen["pipeline_parallel"]
    fields = {"tenant": "", "model": "wanted", "version": 0, "replica": "", "context_length": 1, **chosen}
    settings = EngineSettings.model_validate(fields)
    mib = 0 if without_memory(cluster) else size.mib(num_blocks=settings.num_blocks, ranks=ranks)
    return demand_of(base.name, settings.model_copy(update={"memory_mib": mib}), waking=True)


def _verdict(cluster: tuple[Node, ...], placed: list[Demand], wanted: Demand) -> dict[str, Any]:
    verdict = fits(cluster, placed, wanted)
    if isinstance(verdict, DoesNotFit):
        return {"fits": False, "reason": verdict.reason}
    return {"fits": True, "nodes": list(verdict.nodes), "each": asdict(wanted.each)}


def _print(answer: dict[str, Any]) -> None:
    table = Table(title="Nodes", title_justify="left")
    for name in ("node", "has", "left"):
        table.add_column(name)
    for node in answer["nodes"]:
        table.add_row(Text(node["name"]), str(Room(**node["has"])), str(Room(**node["left"])))
    Console().print(table)
    typer.echo(f"{len(answer['applications'])} applications of versions and pools stand")
    if (wanted := answer.get("wanted")) is not None:
        typer.echo(f"it fits, on {', '.join(wanted['nodes'])}" if wanted["fits"] else wanted["reason"])
