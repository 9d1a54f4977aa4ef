"""``anamorph model``: the models that a tenant has registered."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from anamorph.cli.admin import Connection, Model, Tenant, connected
from anamorph.cli.changes import checked, read_all
from anamorph.cli.output import AsJson, show_record, show_records
from anamorph.cli.policy import read_value
from anamorph.wire.admin import Autoscaling, ModelCreate, ModelPatch, Serving
from anamorph.wire.keyservice import everything

app = typer.Typer(help="Models that a tenant has registered.", no_args_is_help=True)

TokenizerFolder = Annotated[
    Path | None,
    typer.Option("--tokenizer", help="Folder of the tokenizer; clients refuse any other from then on."),
]


@app.command()
@connected
def create(
    connection: Connection,
    tenant: Tenant,
    model: Model,
    base: Annotated[
        str, typer.Option(help="Folder of the plaintext checkpoint, or hf://org/name[@revision].")
    ],
    vocab_size: Annotated[int, typer.Option(min=2, help="Rows of the embedding.")],
    context_length: Annotated[int, typer.Option(min=1, help="Most tokens of prompt and answer together.")],
    base_digest: Annotated[
        str | None, typer.Option(help="What the base must be: sha256:… as a fold reports it.")
    ] = None,
    profile: Annotated[str, typer.Option(help="rotate or permute.")] = "rotate",
    engine: Annotated[str, typer.Option(help="torch, vllm or fake.")] = "torch",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    tokenizer: TokenizerFolder = None,
    placement: Annotated[str | None, typer.Option(help="dedicated, or shared with --pool.")] = None,
    pool: Annotated[str | None, typer.Option(help="Pool whose engine it shares.")] = None,
    tensor_parallel: Annotated[int | None, typer.Option(help="Ranks that each layer is cut into.")] = None,
    pipeline_parallel: Annotated[int | None, typer.Option(help="Ranks that follow each other.")] = None,
    num_gpus: Annotated[float | None, typer.Option(help="GPUs per rank.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Sequences computed at a time.")] = None,
    weight: Annotated[float | None, typer.Option(help="Share of its pool, against others'.")] = None,
    tokens_per_s: Annotated[float | None, typer.Option(help="Bound of ids per second in its pool.")] = None,
    min_replicas: Annotated[int | None, typer.Option(help="0: idle, it leaves its device.")] = None,
    max_replicas: Annotated[int | None, typer.Option(help="Most replicas.")] = None,
    target: Annotated[float | None, typer.Option(help="Requests per replica before one is added.")] = None,
    idle: Annotated[str | None, typer.Option(help="How long idle before a replica leaves: 90s, 15m.")] = None,
    as_json: AsJson = False,
) -> None:
    """Register a model, with the default rotation policy; `anamorph policy set` changes that."""
    scaling = _given(
        min_replicas=min_replicas,
        max_replicas=max_replicas,
        target_ongoing_requests=target,
        idle_s=None if idle is None else read_value("idle_s", idle),
    )
    serving = _given(
        placement=placement,
        pool=pool,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        num_gpus=num_gpus,
        max_concurrent=max_concurrent,
        weight=weight,
        tokens_per_s=tokens_per_s,
        autoscaling=scaling or None,
    )
    fields = {"id": model, "base": base, "vocab_size": vocab_size, "context_length": context_length}
    chosen = {"profile": profile, "engine": engine, "dtype": dtype, "base_digest": base_digest}
    body = _checked(fields | chosen | _digests(tokenizer) | {"serving": serving})
    with connection.keys(tenant, look=f"anamorph model list {tenant}") as keys:
        show_record(keys.create_model(tenant, body), as_json=as_json)


_SCALING, _SERVING = Autoscaling.model_fields, Serving.model_fields.keys() - {"autoscaling"}
_CHANGEABLE = [*(name for name in ModelPatch.model_fields if name != "serving"), *sorted(_SERVING), *_SCALING]


@app.command()
@connected
def update(
    connection: Connection,
    tenant: Tenant,
    model: Model,
    changes: Annotated[
        list[str],
        typer.Argument(metavar="NAME=VALUE…", help="base=/models/v2 base_digest=off tensor_parallel=2 …"),
    ],
    as_json: AsJson = False,
) -> None:
    """Change a model's record, `off` for none. What runs stays as it is: the next version has the change."""
    fields = read_all(_CHANGEABLE, changes, read_value)
    with connection.keys(tenant, look=f"anamorph model show {tenant} {model}") as keys:
        record = keys.get_model(tenant, model)
        patch = checked(ModelPatch, _changed(record.serving, fields))
        changed = keys.update_model(tenant, model, patch, if_match=record.row_version)
    show_record(changed, as_json=as_json)
    if not as_json:
        typer.echo(f"this takes effect with the next rotation: anamorph key rotate {tenant} {model}")


def _changed(serving: Serving, fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a ``ModelPatch``; how a model is served is replaced as a whole, so what stays is in it."""
    scaling = {name: value for name, value in fields.items() if name in _SCALING}
    served = {name: value for name, value in fields.items() if name in _SERVING}
    rest = {name: value for name, value in fields.items() if name not in scaling | served}
    if not (scaling or served):
        return rest
    before = serving.model_dump()
    return rest | {"serving": before | served | {"autoscaling": before["autoscaling"] | scaling}}


def _checked(fields: dict[str, Any]) -> ModelCreate:
    try:
        return ModelCreate.model_validate(fields)
    except ValidationError as error:
        [first, *_] = error.errors()
        raise typer.BadParameter(f"{_option(first['loc'])}{first['msg']}") from None


def _option(place: tuple[int | str, ...]) -> str:
    """The option of a field; nothing for what concerns several of them together."""
    names = [str(part) for part in place if part not in ("serving", "autoscaling")]
    spelled = {"target_ongoing_requests": "target", "idle_s": "idle"}
    return "".join(f"--{spelled.get(name, name).replace('_', '-')}: " for name in names)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _digests(tokenizer: Path | None) -> dict[str, str | None]:
    if tokenizer is None:
        return {}
    from anamorph.client.tokenizer import chat_template_digest, tokenizer_digest

    return {
        "tokenizer_digest": tokenizer_digest(tokenizer),
        "chat_template_digest": chat_template_digest(tokenizer),
    }


@app.command("list")
@connected
def list_models(connection: Connection, tenant: Tenant, as_json: AsJson = False) -> None:
    """List a tenant's models."""
    with connection.keys(tenant, look="anamorph tenant list") as keys:
        show_records(
            f"Models of {tenant}",
            everything(keys.list_models, tenant),
            ("id", "base", "profile", "engine", "dtype", "vocab_size", "context_length", "created_at"),
            as_json=as_json,
            empty=f"no models yet; register one: anamorph model create {tenant} MODEL --base FOLDER …",
        )


@app.command("show")
@connected
def show_model(connection: Connection, tenant: Tenant, model: Model, as_json: AsJson = False) -> None:
    """Show one model and its rotation policy."""
    with connection.keys(tenant, look=f"anamorph model list {tenant}") as keys:
        show_record(keys.get_model(tenant, model), as_json=as_json)
