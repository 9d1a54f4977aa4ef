"""The groups that spaces admit, named as data; ``plan.draw`` knows how to draw from them.

A group says which invertible maps commute with everything a network does in one
space (transforms.md §3), and under which names those maps act on the axes of
tensors: its *views*. The key axis of attention sees one block per key-value head,
the query axis the same block once for every query head of the group.

Sizes are symbols such as ``hidden``, resolved from a configuration by the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class AnyOrder:
    """Permutations of ``size`` coordinates, in both profiles. One view: ``""``."""

    size: str

    def views(self, sizes: Sizes) -> dict[str, int]:
        """The length of the axis each view acts on."""
        return {"": sizes[self.size]}


@dataclass(frozen=True)
class Isometries:
    """All of O(n): a stream whose RMS norms have no gain left. One view: ``""``.

    Under ``permute`` the gains stay, and permutations carry them along.
    """

    size: str

    def views(self, sizes: Sizes) -> dict[str, int]:
        """The length of the axis each view acts on."""
        return {"": sizes[self.size]}


@dataclass(frozen=True)
class _PerHead:
    """``heads`` key-value heads of ``width``, each read by ``copies`` query heads.

    Views: ``kv`` over heads × width, ``query`` over heads × copies × width.
    """

    heads: str = "kv_heads"
    copies: str = "copies"
    width: str = "head_dim"

    def views(self, sizes: Sizes) -> dict[str, int]:
        """The length of the axis each view acts on."""
        kv = sizes[self.heads] * sizes[self.width]
        return {"kv": kv, "query": kv * sizes[self.copies]}


@dataclass(frozen=True)
class HeadOrder(_PerHead):
    """Key-value heads in any order, and query heads in any order inside their group."""


@dataclass(frozen=True)
class PairRotations(_PerHead):
    """Per key-value head and frequency pair of RoPE, a rotation times a scale.

    Coordinate i is paired with i + width/2 (the half-split layout of Hugging Face's
    Llama). It commutes with RoPE whatever its frequencies, so with every rope_type.
    Nothing but the identity under ``permute``: two pairs never share a frequency.
    """


@dataclass(frozen=True)
class HeadMaps(_PerHead):
    """Any invertible map of each key-value head: GL(width); permutations under ``permute``."""


@dataclass(frozen=True)
class GatedNeurons:
    """Neurons of act(gate) · up: any order, and on the up branch a sign and a scale.

    Views: ``gate`` (order only), ``up`` (order, sign, scale), which is also the view
    of their product.
    """

    size: str

    def views(self, sizes: Sizes) -> dict[str, int]:
        """The length of the axis each view acts on."""
        return {"gate": sizes[self.size], "up": sizes[self.size]}


Group = AnyOrder | Isometries | HeadOrder | PairRotations | HeadMaps | GatedNeurons
