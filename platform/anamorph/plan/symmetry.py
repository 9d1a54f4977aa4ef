"""Symmetries: small invertible maps that compose, invert and act on one axis of an array.

A symmetry g of size n acts on an axis of length n as new[i] = Σ_j g[i, j] · old[j].
The axis of a weight that *consumes* those coordinates moves by the dual g⁻ᵀ, so that
(W g⁻¹)(g x) = W x.

Arrays are NumPy's, or whatever ``lifted`` made of them: indexing, ``@``, ``*``,
``reshape`` and ``swapaxes`` are all that ``act`` asks for, and torch has them too.
No symmetry shows its numbers: they are key material.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Array = Any  # numpy.ndarray, or torch.Tensor after ``lifted``
Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


class Symmetry(ABC):
    """An invertible map of ``size`` coordinates."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How many coordinates it acts on."""

    @abstractmethod
    def act(self, array: Array, axis: int = 0) -> Array:
        """Move ``array`` along ``axis``, whose length is ``size``; the array itself stays as it is."""

    @abstractmethod
    def dual(self) -> Symmetry:
        """The contragredient g⁻ᵀ."""

    @abstractmethod
    def inverse(self) -> Symmetry:
        """g⁻¹."""

    def lifted(self, lift: Callable[[Any], Array]) -> Self:
        """The same symmetry with its arrays passed through ``lift`` (to a device, to a dtype)."""
        return replace(self, **{name: _lifted(value, lift) for name, value in vars(self).items()})  # type: ignore[type-var]

    def split(self) -> tuple[Monomial, Symmetry]:
        """A permutation that comes first, and what remains to be done after it."""
        return Monomial(self.size), self

    def __matmul__(self, first: Symmetry) -> Symmetry:
        """``self`` after ``first``."""
        return Chain((first, self))

    def matrix(self) -> Floats:
        """The map as a dense matrix. Shape (size, size), float64."""
        return np.asarray(self.act(np.eye(self.size)))

    def condition(self) -> float:
        """Largest over smallest singular value."""
        return float(np.linalg.cond(self.matrix()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(size={self.size})"


def _lifted(value: Any, lift: Callable[[Any], Array]) -> Any:
    if isinstance(value, np.ndarray):
        return lift(value)
    return tuple(part.lifted(lift) for part in value) if isinstance(value, tuple) else value


@dataclass(frozen=True, eq=False, repr=False)
class Monomial(Symmetry):
    """new[i] = factors[i] · old[source[i]]; no ``source`` keeps the order, no ``factors`` the values.

    Without factors it moves bytes and rounds nothing.
    """

    length: int
    source: Array | None = None
    factors: Array | None = None

    @property
    def size(self) -> int:
        """How many coordinates it acts on."""
        return self.length

    @property
    def moves_only(self) -> bool:
        """True for permutations: values are never touched."""
        return self.factors is None

    def act(self, array: Array, axis: int = 0) -> Array:
        """Index, then multiply."""
        moved = array if self.source is None else _take(array, self.source, axis)
        if self.factors is None:
            return moved
        return moved * self.factors.reshape((-1,) + (1,) * (array.ndim - axis - 1))

    def rows(self, start: int, stop: int) -> Monomial:
        """What makes coordinates ``start`` to ``stop`` of the result, out of all coordinates."""
        source = slice(start, stop) if self.source is None else self.source[start:stop]
        return Monomial(stop - start, source, None if self.factors is None else self.factors[start:stop])

    def split(self) -> tuple[Monomial, Monomial]:
        """The permutation, and the factors that come after it."""
        return replace(self, factors=None), replace(self, source=None)

    def dual(self) -> Monomial:
        """The order stays, the factors turn over."""
        return self if self.factors is None else replace(self, factors=1.0 / self.factors)

    def inverse(self) -> Monomial:
        """Undo the factors, then the order."""
        back = None if self.source is None else np.argsort(self.source)
        factors = None if self.factors is None else 1.0 / self.factors
        return Monomial(self.length, back, factors if back is None or factors is None else factors[back])

    def __matmul__(self, first: Symmetry) -> Symmetry:
        """Monomials are closed under composition."""
        if not isinstance(first, Monomial):
            return super().__matmul__(first)
        order = np.arange(self.length) if self.source is None else self.source
        source = order if first.source is None else first.source[order]
        mine = np.ones(self.length) if self.factors is None else self.factors
        factors = mine if first.factors is None else mine * first.factors[order]
        exact = self.moves_only and first.moves_only
        return Monomial(self.length, source, None if exact else factors)


def _take(array: Array, source: Any, axis: int) -> Array:
    if isinstance(source, slice):
        return array[(slice(None),) * axis + (source,)]
    # Both libraries index by brackets too, several times slower along any axis but the first.
    return np.take(array, source, axis) if isinstance(array, np.ndarray) else array.index_select(axis, source)


def identity(size: int) -> Monomial:
    """The map that changes nothing."""
    return Monomial(size)


def permutation(image: Indices) -> Monomial:
    """Coordinate j goes to ``image[j]``."""
    return Monomial(len(image), np.argsort(image))


def block_permutation(image: Indices, width: int) -> Monomial:
    """Block j of ``width`` coordinates goes to block ``image[j]``, its inside unchanged."""
    return permutation((image[:, None] * width + np.arange(width)).reshape(-1))


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Symmetry):
    """A full matrix; ``orthogonal`` promises that its inverse is its transpose."""

    values: Array
    orthogonal: bool = False

    @property
    def size(self) -> int:
        """How many coordinates it acts on."""
        return int(self.values.shape[0])

    def act(self, array: Array, axis: int = 0) -> Array:
        """One matrix product, from the right for the last axis and from the left for others."""
        if axis == array.ndim - 1:
            return array @ self.values.T
        front = array.swapaxes(0, axis)
        moved = self.values @ front.reshape(self.size, -1)
        return moved.reshape(front.shape).swapaxes(0, axis)

    def dual(self) -> Dense:
        """Itself when orthogonal."""
        return self if self.orthogonal else Dense(np.linalg.inv(self.values).T)

    def inverse(self) -> Dense:
        """The transpose when orthogonal."""
        return Dense(self.values.T if self.orthogonal else np.linalg.inv(self.values), self.orthogonal)


@dataclass(frozen=True, eq=False, repr=False)
class Blocks(Symmetry):
    """A block diagonal matrix of equal blocks, such as one per head. Shape (blocks, width, width)."""

    values: Array

    @property
    def size(self) -> int:
        """How many coordinates it acts on."""
        return int(self.values.shape[0] * self.values.shape[1])

    def act(self, array: Array, axis: int = 0) -> Array:
        """One batched matrix product over the blocks."""
        blocks, width = self.values.shape[0], self.values.shape[1]
        front = array.swapaxes(0, axis)
        moved = self.values @ front.reshape(blocks, width, -1)
        return moved.reshape(front.shape).swapaxes(0, axis)

    def dual(self) -> Blocks:
        """Every block's inverse, transposed."""
        return Blocks(np.linalg.inv(self.values).swapaxes(1, 2))

    def inverse(self) -> Blocks:
        """Every block's inverse."""
        return Blocks(np.linalg.inv(self.values))

    def repeated(self, copies: int) -> Blocks:
        """Each block ``copies`` times in a row: how query heads see their group's block."""
        return Blocks(np.repeat(self.values, copies, axis=0))

    def condition(self) -> float:
        """Largest over smallest singular value, over all blocks."""
        singular = np.linalg.svd(self.values, compute_uv=False)
        return float(singular.max() / singular.min())


@dataclass(frozen=True, eq=False, repr=False)
class Chain(Symmetry):
    """Symmetries of one size applied one after the other, first to last."""

    steps: tuple[Symmetry, ...]

    @property
    def size(self) -> int:
        """How many coordinates it acts on."""
        return self.steps[0].size

    def act(self, array: Array, axis: int = 0) -> Array:
        """Every step in turn."""
        return reduce(lambda moved, step: step.act(moved, axis), self.steps, array)

    def split(self) -> tuple[Monomial, Symmetry]:
        """What the first step begins with, and the rest."""
        order, rest = self.steps[0].split()
        return order, compose((rest, *self.steps[1:]))

    def dual(self) -> Chain:
        """The dual of a product is the product of the duals, in the same order."""
        return Chain(tuple(step.dual() for step in self.steps))

    def inverse(self) -> Chain:
        """Every inverse, last to first."""
        return Chain(tuple(step.inverse() for step in reversed(self.steps)))


@dataclass(frozen=True, eq=False, repr=False)
class Stacked(Symmetry):
    """Symmetries that act on successive parts of one axis: the axis of a fused tensor."""

    parts: tuple[Symmetry, ...]

    @property
    def size(self) -> int:
        """How many coordinates it acts on."""
        return sum(part.size for part in self.parts)

    def act(self, array: Array, axis: int = 0) -> Array:
        """Every part on its own stretch."""
        moved = array * 1
        start = 0
        for part in self.parts:
            stretch = (slice(None),) * axis + (slice(start, start + part.size),)
            moved[stretch] = part.act(array[stretch], axis)
            start += part.size
        return moved

    def dual(self) -> Stacked:
        """The dual of every part."""
        return Stacked(tuple(part.dual() for part in self.parts))

    def inverse(self) -> Stacked:
        """The inverse of every part."""
        return Stacked(tuple(part.inverse() for part in self.parts))


def compose(steps: tuple[Symmetry, ...]) -> Symmetry:
    """Steps applied first to last, simplified where they are closed under composition."""
    telling = tuple(step for step in steps if not is_identity(step))
    return reduce(lambda done, step: step @ done, telling or steps[:1])


def is_identity(symmetry: Symmetry) -> bool:
    """True for a map that is known to change nothing."""
    return isinstance(symmetry, Monomial) and symmetry.source is None and symmetry.factors is None


def stack(parts: tuple[Symmetry, ...]) -> Symmetry:
    """Parts that lie one after the other on one axis."""
    return parts[0] if len(parts) == 1 else Stacked(parts)
