"""Symmetries form a group and act: whatever they are made of, on any axis, in NumPy and in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anamorph.plan.symmetry import (
    Blocks,
    Chain,
    Dense,
    Monomial,
    Stacked,
    Symmetry,
    block_permutation,
    compose,
    identity,
    is_identity,
    permutation,
    stack,
)

SIZE = 6


def _random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def _well_conditioned(random: np.random.Generator, *shape: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    left, _, right = np.linalg.svd(random.normal(size=shape))
    scales = random.uniform(0.5, 2.0, size=shape[:-1])
    return np.asarray((left * scales[..., None, :]) @ right)


def _orthogonal(random: np.random.Generator) -> Symmetry:
    return Dense(np.linalg.qr(random.normal(size=(SIZE, SIZE)))[0], orthogonal=True)


MAKERS: dict[str, Callable[[np.random.Generator], Symmetry]] = {
    "identity": lambda _: identity(SIZE),
    "permutation": lambda random: permutation(random.permutation(SIZE)),
    "block permutation": lambda random: block_permutation(random.permutation(3), 2),
    "scaling": lambda random: Monomial(SIZE, factors=random.uniform(0.5, 2.0, SIZE)),
    "monomial": lambda random: Monomial(SIZE, random.permutation(SIZE), -random.uniform(0.5, 2.0, SIZE)),
    "dense": lambda random: Dense(_well_conditioned(random, SIZE, SIZE)),
    "orthogonal": _orthogonal,
    "blocks": lambda random: Blocks(_well_conditioned(random, 3, 2, 2)),
}

simple = st.builds(
    lambda name, seed: MAKERS[name](_random(seed)), st.sampled_from(sorted(MAKERS)), st.integers(0, 99)
)
symmetries = st.recursive(
    simple,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map(lambda steps: compose(tuple(steps))),
        st.lists(inner, min_size=2, max_size=3).map(lambda steps: Chain(tuple(steps))),
    ),
    max_leaves=4,
)
stacked = st.lists(simple, min_size=1, max_size=3).map(lambda parts: stack(tuple(parts)))
anything = st.one_of(symmetries, stacked)
seeds = st.integers(0, 99)


@given(anything, seeds)
def test_action_is_the_matrix(symmetry: Symmetry, seed: int) -> None:
    """Acting on an axis of any array, first, middle or last, is multiplying by the matrix there."""
    array = _random(seed).normal(size=(symmetry.size, symmetry.size, symmetry.size))
    for axis, formula in enumerate(("ai,ijk->ajk", "ai,jik->jak", "ai,jki->jka")):
        expected = np.einsum(formula, symmetry.matrix(), array)
        np.testing.assert_allclose(symmetry.act(array, axis), expected, atol=1e-12)


@given(anything, seeds)
def test_torch_does_as_numpy(symmetry: Symmetry, seed: int) -> None:
    """Lifted into torch, a symmetry does what it does in NumPy, on vectors and matrices."""
    lifted = symmetry.lifted(lambda a: torch.from_numpy(np.ascontiguousarray(a)))
    for shape, axis in (((symmetry.size,), 0), ((symmetry.size, 5), 0), ((5, symmetry.size), 1)):
        array = _random(seed).normal(size=shape)
        found = lifted.act(torch.from_numpy(array), axis)
        np.testing.assert_allclose(found.numpy(), symmetry.act(array, axis), atol=1e-12)


@given(anything)
def test_inverse_undoes(symmetry: Symmetry) -> None:
    """g⁻¹ after g, and g after g⁻¹, change nothing."""
    eye = np.eye(symmetry.size)
    np.testing.assert_allclose(symmetry.inverse().act(symmetry.matrix()), eye, atol=1e-9)
    np.testing.assert_allclose(symmetry.act(symmetry.inverse().matrix()), eye, atol=1e-9)


@given(anything)
def test_dual_is_the_inverse_transposed(symmetry: Symmetry) -> None:
    """The dual's matrix is g⁻ᵀ, so that a weight which consumes moved coordinates sees no move."""
    np.testing.assert_allclose(symmetry.dual().matrix(), symmetry.inverse().matrix().T, atol=1e-9)


@given(symmetries, symmetries)
def test_composition_multiplies_matrices(second: Symmetry, first: Symmetry) -> None:
    """``second @ first`` acts as first does, then as second does, however it is simplified."""
    np.testing.assert_allclose((second @ first).matrix(), second.matrix() @ first.matrix(), atol=1e-12)


@given(st.lists(simple, min_size=1, max_size=4))
def test_compose_applies_first_to_last(steps: list[Symmetry]) -> None:
    """``compose`` reads in the order in which things happen, and drops nothing but identities."""
    expected = np.eye(SIZE)
    for step in steps:
        expected = step.matrix() @ expected
    np.testing.assert_allclose(compose(tuple(steps)).matrix(), expected, atol=1e-12)


@given(anything)
def test_split_loses_nothing(symmetry: Symmetry) -> None:
    """The order that comes first and the rest make the whole, and the order rounds nothing."""
    order, rest = symmetry.split()
    assert order.moves_only
    np.testing.assert_allclose(rest.matrix() @ order.matrix(), symmetry.matrix(), atol=1e-12)


@given(st.sampled_from(["identity", "permutation", "scaling", "monomial"]), seeds, st.integers(0, SIZE - 1))
def test_rows_of_a_monomial(name: str, seed: int, start: int) -> None:
    """A part of the rows, made alone, is that part of the whole."""
    monomial, stop = MAKERS[name](_random(seed)), min(start + 2, SIZE)
    assert isinstance(monomial, Monomial)
    array = _random(seed).normal(size=(SIZE, 4))
    found = monomial.rows(start, stop).act(array)
    np.testing.assert_array_equal(found, monomial.act(array)[start:stop])


@given(seeds)
def test_a_permutation_sends_each_coordinate_to_its_image(seed: int) -> None:
    """``permutation(image)`` moves what was at j to ``image[j]``: the convention of the vocabulary."""
    image = _random(seed).permutation(SIZE)
    moved = permutation(image).act(np.arange(SIZE))
    assert [moved[image[j]] for j in range(SIZE)] == list(range(SIZE))


@given(seeds)
def test_permutations_move_any_bits(seed: int) -> None:
    """Not a number, infinities, negative zero and subnormals pass through a permutation as they are."""
    bits = _random(seed).integers(0, 2**16, SIZE).astype(np.uint16)
    symmetry = permutation(_random(seed).permutation(SIZE))
    values = bits.view(np.float16)
    np.testing.assert_array_equal(symmetry.act(values).view(np.uint16), symmetry.act(bits))


@given(seeds)
def test_condition_is_that_of_the_matrix(seed: int) -> None:
    """Blocks find their condition number without the full matrix, and find the same."""
    blocks = Blocks(_well_conditioned(_random(seed), 3, 2, 2))
    assert blocks.condition() == pytest.approx(np.linalg.cond(blocks.matrix()))


def test_orthogonal_is_its_own_dual() -> None:
    """No inverse of the residual's matrix is ever computed."""
    symmetry = _orthogonal(_random(0))
    assert symmetry.dual() is symmetry


def test_acting_leaves_the_array_alone() -> None:
    """A fused axis is written part by part, but into a copy."""
    array = np.ones((2 * SIZE, 2))
    Stacked((MAKERS["dense"](_random(1)), MAKERS["monomial"](_random(2)))).act(array)
    np.testing.assert_array_equal(array, np.ones((2 * SIZE, 2)))


def test_identities_are_recognised() -> None:
    """Only a map known to do nothing counts as one."""
    assert is_identity(identity(3))
    assert not is_identity(permutation(np.arange(3)))


@pytest.mark.parametrize("name", MAKERS)
def test_no_symmetry_shows_its_numbers(name: str) -> None:
    """A symmetry is key material: its repr has its kind and size only."""
    symmetry = MAKERS[name](_random(0))
    assert repr(symmetry) == f"{type(symmetry).__name__}(size={SIZE})"
