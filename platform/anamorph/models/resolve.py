"""From a configuration to the table of one checkpoint: sizes filled in, layers written out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, TypeVar

from anamorph.errors import UnknownArchitecture, UnsupportedOption
from anamorph.models.llama import LLAMA
from anamorph.models.mistral import MISTRAL
from anamorph.models.options import Rule
from anamorph.models.qwen2 import QWEN2
from anamorph.models.table import Axis, Family, Norm, Ratio, Size, Space, Tensor, Tie, View

T = TypeVar("T")

FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, QWEN2)


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor: ``dtype`` as safetensors writes it (``BF16``, ``F32`` …) and shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Table:
    """The table of one checkpoint, every name concrete.

    ``spaces``, ``tensors`` and ``norms`` go by name, in table order; ``tie`` is there
    when the checkpoint's head is tied.
    """

    id: str
    sizes: Mapping[str, int]
    options: Mapping[str, Rule]
    spaces: Mapping[str, Space]
    tensors: Mapping[str, Tensor]
    norms: Mapping[str, Norm]
    tie: Tie | None
    ignored: frozenset[str]

    def length(self, axis: Axis) -> int:
        """How many coordinates ``axis`` has."""
        return sum(self._part_length(part) for part in axis.parts)

    def _part_length(self, part: tuple[View, ...]) -> int:
        lengths = {self.spaces[view.space].group.views(self.sizes)[view.name] for view in part}
        (length,) = lengths
        return length


def table_for(config: Mapping[str, Any]) -> Table:
    """The table of the checkpoint that ``config`` describes.

    Raises:
        UnknownArchitecture: no family has this architecture.
        UnsupportedOption: a key or value of the configuration that the family does not cover.
    """
    family = _family(config)
    _check_options(family, config)
    sizes = _sizes(family, config)
    tied = family.tie is not None and bool(config.get(family.tie.flag, False))
    return Table(
        id=family.id,
        sizes=sizes,
        options=family.options,
        spaces={space.name: space for space in _written_out(family.spaces, family, sizes, _space_at)},
        tensors={tensor.name: tensor for tensor in _present_tensors(family, config, sizes)},
        norms={norm.gain: norm for norm in _written_out(family.norms, family, sizes, _norm_at)},
        tie=family.tie if tied else None,
        ignored=frozenset(_written_out(family.ignored, family, sizes, _fill)),
    )


def _family(config: Mapping[str, Any]) -> Family:
    named = config.get("architectures")
    for family in FAMILIES:
        if named == [family.architecture]:
            if config.get("model_type") != family.model_type:
                raise UnsupportedOption(f"option 'model_type': {family.model_type!r} is expected")
            return family
    known = ", ".join(family.architecture for family in FAMILIES)
    raise UnknownArchitecture(f"no table for architectures {named!r}; there are tables for {known}")


def _check_options(family: Family, config: Mapping[str, Any]) -> None:
    for name, value in config.items():
        if name not in family.options:
            raise UnsupportedOption(f"option '{name}' is unknown for {family.architecture}")
        family.options[name].check(name, value)


def _sizes(family: Family, config: Mapping[str, Any]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for symbol, size in family.sizes.items():
        sizes[symbol] = _size(size, config, sizes)
    for symbol in family.even:
        if sizes[symbol] % 2:
            raise UnsupportedOption(f"{symbol} is {sizes[symbol]}; an even number is expected")
    return sizes


def _size(size: Size, config: Mapping[str, Any], known: Mapping[str, int]) -> int:
    if size.key is not None and size.key not in config and not size.optional:
        raise UnsupportedOption(f"option '{size.key}' is missing")
    value = config.get(size.key) if size.key is not None else None
    if value is None and size.default is not None:
        return _quotient(size.default, known) if isinstance(size.default, Ratio) else known[size.default]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedOption(f"option '{size.key}': {value!r} is not a positive whole number")
    return value


def _quotient(ratio: Ratio, known: Mapping[str, int]) -> int:
    quotient, rest = divmod(known[ratio.of], known[ratio.by])
    if rest:
        raise UnsupportedOption(
            f"{ratio.of} ({known[ratio.of]}) is no multiple of {ratio.by} ({known[ratio.by]})"
        )
    return quotient


def _present_tensors(family: Family, config: Mapping[str, Any], sizes: Mapping[str, int]) -> Iterator[Tensor]:
    present = [tensor for tensor in family.tensors if _holds(tensor.when, config)]
    return _written_out(present, family, sizes, _tensor_at)


def _holds(when: str | None, config: Mapping[str, Any]) -> bool:
    if when is None:
        return True
    return bool(config.get(when.removeprefix("!"), False)) != when.startswith("!")


def _written_out(
    items: Iterable[T], family: Family, sizes: Mapping[str, int], fill: Callable[[T, str, int], T]
) -> Iterator[T]:
    """Each item once per value of the index in its name; neighbours with one index take turns."""
    for letter, group in groupby(items, key=_index_letter):
        if letter is None:
            yield from group
            continue
        template = list(group)
        for value in range(sizes[family.indices[letter]]):
            yield from (fill(item, letter, value) for item in template)


def _index_letter(item: Any) -> str | None:
    name = item if isinstance(item, str) else item.gain if isinstance(item, Norm) else item.name
    found = re.search(r"\{(\w)\}", name)
    return found[1] if found else None


def _fill(name: str, letter: str, value: int) -> str:
    return name.replace(f"{{{letter}}}", str(value))


def _space_at(space: Space, letter: str, value: int) -> Space:
    return replace(space, name=_fill(space.name, letter, value))


def _norm_at(norm: Norm, letter: str, value: int) -> Norm:
    consumers = tuple(_fill(consumer, letter, value) for consumer in norm.consumers)
    return replace(norm, gain=_fill(norm.gain, letter, value), consumers=consumers)


def _tensor_at(tensor: Tensor, letter: str, value: int) -> Tensor:
    axes = tuple(_axis_at(axis, letter, value) for axis in tensor.axes)
    return replace(tensor, name=_fill(tensor.name, letter, value), axes=axes)


def _axis_at(axis: Axis, letter: str, value: int) -> Axis:
    return Axis(
        tuple(
            tuple(replace(view, space=_fill(view.space, letter, value)) for view in part)
            for part in axis.parts
        )
    )
