"""Key × table → plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from anamorph.errors import MissingTensor, UnknownTensor, UnsupportedOption, WrongShape
from anamorph.keys import TenantKey
from anamorph.models import Table, TensorInfo, table_for
from anamorph.models.options import GENERATION
from anamorph.models.table import Norm, Tensor
from anamorph.plan.draw import PROFILES, Profile
from anamorph.plan.plan import Coordinates, Gain, Step, TransformPlan
from anamorph.plan.rewrite import rewrite

DTYPES = ("F64", "F32", "BF16", "F16")


def build_plan(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    key: TenantKey,
    profile: Profile = "rotate",
    *,
    generation_config: Mapping[str, Any] | None = None,
) -> TransformPlan:
    """Plan the replica of the checkpoint that ``config`` and ``tensors`` describe.

    Raises:
        UnknownArchitecture, UnsupportedOption: no table covers the configuration.
        UnknownTensor, MissingTensor, WrongShape: the tensors are not those of the table.
    """
    if profile not in PROFILES:
        raise UnsupportedOption(f"profile {profile!r} is unknown; there are {', '.join(PROFILES)}")
    table = table_for(config)
    _check_tensors(table, tensors)
    folded = table.norms if profile == "rotate" else {}
    added = _untied(table, folded)
    coordinates = Coordinates(table, key, profile)
    image = coordinates.image(table.sizes["vocab"])
    return TransformPlan(
        table_id=table.id,
        profile=profile,
        key_id=key.id,
        sizes=table.sizes,
        spaces=table.spaces,
        steps=tuple(_steps(table, tensors, folded, added)),
        config=rewrite(config, table.options, image) | _untied_flag(table, added),
        generation_config=None
        if generation_config is None
        else rewrite(generation_config, GENERATION, image),
        added=tuple(tensor.name for tensor in added),
        duplicates=_duplicates(table, tensors),
        coordinates=coordinates,
    )


def _untied(table: Table, folded: Mapping[str, Norm]) -> tuple[Tensor, ...]:
    """A tied head into which a norm is folded is no longer the embedding."""
    if table.tie is None or not any(table.tie.tensor.name in norm.consumers for norm in folded.values()):
        return ()
    return (table.tie.tensor,)


def _untied_flag(table: Table, added: tuple[Tensor, ...]) -> dict[str, Any]:
    return {table.tie.flag: False} if table.tie is not None and added else {}


def _duplicates(table: Table, tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Some checkpoints store a tied head beside the embedding; it must then be the same."""
    if table.tie is None or table.tie.tensor.name not in tensors:
        return {}
    return {table.tie.tensor.name: table.tie.source}


def _steps(
    table: Table, tensors: Mapping[str, TensorInfo], folded: Mapping[str, Norm], added: tuple[Tensor, ...]
) -> Iterator[Step]:
    gains = _gains(table, folded, added)
    for tensor in (*table.tensors.values(), *added):
        source = table.tie.source if table.tie is not None and tensor in added else tensor.name
        yield Step(
            name=tensor.name,
            source=source,
            axes=tensor.axes,
            shape=tensors[source].shape,
            dtype=tensors[source].dtype,
            gains=gains.get(tensor.name, ()),
            fill=folded[tensor.name].unit if tensor.name in folded else None,
        )


def _gains(
    table: Table, folded: Mapping[str, Norm], added: tuple[Tensor, ...]
) -> dict[str, tuple[Gain, ...]]:
    """Which gains each consumer takes in, on the dimension that reads the norm's output."""
    present = {tensor.name: tensor for tensor in (*table.tensors.values(), *added)}
    gains: dict[str, tuple[Gain, ...]] = {}
    for norm in folded.values():
        (out,) = present[norm.gain].axes
        for consumer in norm.consumers:
            dim = present[consumer].axes.index(~out)
            gain = Gain(dim, norm.gain, offset=1.0 - norm.unit)
            gains[consumer] = (*gains.get(consumer, ()), gain)
    return gains


def _check_tensors(table: Table, tensors: Mapping[str, TensorInfo]) -> None:
    expected = dict(table.tensors)
    if table.tie is not None and table.tie.tensor.name in tensors:
        expected[table.tie.tensor.name] = table.tie.tensor
    for name, tensor in expected.items():
        if name not in tensors:
            raise MissingTensor(f"tensor '{name}' is missing from the checkpoint")
        _check_tensor(table, tensor, tensors[name])
    unknown = sorted(set(tensors) - set(expected) - table.ignored)
    if unknown:
        raise UnknownTensor(f"tensor '{unknown[0]}' is not in table {table.id} for this configuration")


def _check_tensor(table: Table, tensor: Tensor, info: TensorInfo) -> None:
    shape = tuple(table.length(axis) for axis in tensor.axes)
    if info.shape != shape:
        raise WrongShape(f"tensor '{tensor.name}' has shape {info.shape}; {shape} is expected")
    if info.dtype not in DTYPES:
        raise WrongShape(
            f"tensor '{tensor.name}' is stored as {info.dtype}; only {', '.join(DTYPES)} can be folded"
        )
