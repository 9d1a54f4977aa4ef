"""What a family of checkpoints looks like, as data: spaces, axes, tensors, norms.

Every axis of every tensor lives in a named space (transforms.md §1). A key draws
one group element per space; an axis says through which views it sees the elements
of which spaces. An axis that *produces* coordinates moves by g, an axis that
*consumes* them by the contragredient g⁻ᵀ, written ``~axis``: so a weight with rows
``out`` and columns ``~in`` becomes g_out · W · g_in⁻¹. A query is dual to its key
in the same sense, since attention only ever pairs them.

Names may contain ``{l}``, which stands for every layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from anamorph.models.groups import Group
from anamorph.models.options import Rule


@dataclass(frozen=True)
class View:
    """One action of a space's group: ``name`` as in its group, ``dual`` for g⁻ᵀ."""

    space: str
    name: str = ""
    dual: bool = False

    def __invert__(self) -> View:
        return View(self.space, self.name, not self.dual)

    def __str__(self) -> str:
        return "~" * self.dual + self.space + f"/{self.name}" * bool(self.name)


@dataclass(frozen=True)
class Axis:
    """How one dimension of a tensor moves.

    ``parts`` lie one after the other along the dimension (a fused tensor has more
    than one); each part is acted on by its views, first to last.
    """

    parts: tuple[tuple[View, ...], ...]

    def __invert__(self) -> Axis:
        return Axis(tuple(tuple(~view for view in part) for part in self.parts))

    def __add__(self, other: Axis) -> Axis:
        return Axis(self.parts + other.parts)

    def __str__(self) -> str:
        return " + ".join(" then ".join(map(str, part)) for part in self.parts)


def axis(*views: View) -> Axis:
    """An axis of one part."""
    return Axis((views,))


@dataclass(frozen=True)
class Space:
    """A named space and the group it admits."""

    name: str
    group: Group


@dataclass(frozen=True)
class Tensor:
    """A tensor: its name, one axis per dimension, and the configuration flag it depends on.

    ``when`` names a flag (``"mlp_bias"``, or ``"!tie_word_embeddings"`` for its
    negation); ``None`` means always present.
    """

    name: str
    axes: tuple[Axis, ...]
    when: str | None = None


def linear(name: str, out: Axis, into: Axis, *, when: str | None = None) -> Tensor:
    """``name.weight`` of a linear layer that stores (out, in). GPT-2's Conv1D stores (in, out) instead."""
    return Tensor(f"{name}.weight", (out, ~into), when)


def bias(name: str, out: Axis, *, when: str | None = None) -> Tensor:
    """``name.bias``: it moves with the output."""
    return Tensor(f"{name}.bias", (out,), when)


@dataclass(frozen=True)
class Norm:
    """A norm whose gain can be folded into the ``consumers``: the weights that read its output.

    A gain that is folded leaves ``unit`` behind (1; Gemma's norms multiply by 1 + w, so 0).
    """

    gain: str
    consumers: tuple[str, ...]
    unit: float = 1.0


@dataclass(frozen=True)
class Tie:
    """``tensor`` is not stored when the configuration sets ``flag``: it is the one called ``source``.

    A profile that folds the last norm into the head has to untie the two.
    """

    flag: str
    tensor: Tensor
    source: str


@dataclass(frozen=True)
class Ratio:
    """A size that is the quotient of two others, which must divide."""

    of: str
    by: str


@dataclass(frozen=True)
class Size:
    """A size read from ``key``, or from ``default`` where that is null, or absent and ``optional``."""

    key: str | None
    default: str | Ratio | None = None
    optional: bool = False


@dataclass(frozen=True)
class Family:
    """All checkpoints of one architecture.

    Args:
        id: name and revision of this table; a replica's manifest carries it.
        ignored: tensors that the reference class recomputes and never reads.
        even: sizes that must be even.
    """

    id: str
    architecture: str
    model_type: str
    sizes: Mapping[str, Size]
    options: Mapping[str, Rule]
    spaces: tuple[Space, ...]
    tensors: tuple[Tensor, ...]
    norms: tuple[Norm, ...]
    tie: Tie | None = None
    ignored: tuple[str, ...] = ()
    even: tuple[str, ...] = ()
    indices: Mapping[str, str] = field(default_factory=lambda: {"l": "layers"})
