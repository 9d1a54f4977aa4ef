"""From a configuration to the table of one checkpoint: sizes filled in, layers written out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from anamorph.errors import UnknownArchitecture, UnsupportedOption
from anamorph.models.llama import LLAMA
from anamorph.models.mistral import MISTRAL
from anamorph.models.options import Rule
from anamorph.models.qwen2 import QWEN2
from anamorph.models.table import Axis, Family, Norm, Ratio, Size, Space, Tensor, Tie, View

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
