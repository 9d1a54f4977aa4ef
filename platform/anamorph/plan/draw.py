"""From a group and a subkey's stream to the symmetries that its views see.

The order of draws is normative and versioned (docs/spec/plan.md): a second
implementation that reads the same words in the same order builds the same replica.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np

from anamorph.keys import Stream
from anamorph.models.groups import (
    AnyOrder,
    GatedNeurons,
    Group,
    HeadMaps,
    HeadOrder,
    Isometries,
    PairRotations,
    Sizes,
)
from anamorph.plan.symmetry import (
    Blocks,
    Dense,
    Floats,
    Monomial,
    Symmetry,
    block_permutation,
    identity,
    permutation,
)

Profile = Literal["permute", "rotate"]
PROFILES: tuple[Profile, ...] = get_args(Profile)

Views = Mapping[str, Symmetry]


def draw(group: Group, sizes: Sizes, stream: Stream, profile: Profile) -> Views:
    """One element of ``group``, as each view sees it.

    ``permute`` draws from the group's permutations, ``rotate`` from all of it that has
    a condition number of at most 4.
    """
    rotate = profile == "rotate"
    match group:
        case AnyOrder():
            return {"": permutation(stream.permutation(sizes[group.size]))}
        case Isometries():
            return {"": _isometry(sizes[group.size], stream, rotate)}
        case HeadOrder():
            return _head_order(group, sizes, stream)
        case PairRotations():
            return _pair_rotations(group, sizes, stream, rotate)
        case HeadMaps():
            return _head_maps(group, sizes, stream, rotate)
        case GatedNeurons():
            return _gated_neurons(sizes[group.size], stream, rotate)


def _scales(n: int, stream: Stream) -> Floats:
    """2^(2u-1): between 1/2 and 2, so no two differ by more than a factor of 4."""
    return np.exp2(2.0 * stream.uniforms(n) - 1.0)


def _isometry(n: int, stream: Stream, rotate: bool) -> Symmetry:
    return Dense(stream.orthogonal(n), orthogonal=True) if rotate else permutation(stream.permutation(n))


def _head_order(group: HeadOrder, sizes: Sizes, stream: Stream) -> Views:
    heads, copies, width = sizes[group.heads], sizes[group.copies], sizes[group.width]
    order = stream.permutation(heads)
    inside = np.stack([stream.permutation(copies) for _ in range(heads)])  # (heads, copies)
    queries = (order[:, None] * copies + inside).reshape(-1)
    return {"kv": block_permutation(order, width), "query": block_permutation(queries, width)}


def _pair_rotations(group: PairRotations, sizes: Sizes, stream: Stream, rotate: bool) -> Views:
    heads, copies, width = sizes[group.heads], sizes[group.copies], sizes[group.width]
    if not rotate:
        return {"kv": identity(heads * width), "query": identity(heads * copies * width)}
    half = width // 2
    angles = (2.0 * np.pi * stream.uniforms(heads * half)).reshape(heads, half)
    scales = _scales(heads * half, stream).reshape(heads, half)
    blocks = np.zeros((heads, width, width))
    first, second = np.arange(half), np.arange(half, width)
    blocks[:, first, first] = blocks[:, second, second] = scales * np.cos(angles)
    blocks[:, second, first] = scales * np.sin(angles)
    blocks[:, first, second] = -blocks[:, second, first]
    return {"kv": Blocks(blocks), "query": Blocks(blocks).repeated(copies)}


def _head_maps(group: HeadMaps, sizes: Sizes, stream: Stream, rotate: bool) -> Views:
    heads, copies, width = sizes[group.heads], sizes[group.copies], sizes[group.width]
    if rotate:
        blocks = Blocks(np.stack([_head_map(width, stream) for _ in range(heads)]))
        return {"kv": blocks, "query": blocks.repeated(copies)}
    inside = np.stack([stream.permutation(width) for _ in range(heads)])  # (heads, width)
    start = np.arange(heads)[:, None] * width
    repeated = np.repeat(inside, copies, axis=0) + np.arange(heads * copies)[:, None] * width
    return {"kv": permutation((inside + start).reshape(-1)), "query": permutation(repeated.reshape(-1))}


def _head_map(width: int, stream: Stream) -> Floats:
    left = stream.orthogonal(width)
    scales = _scales(width, stream)
    return (left * scales) @ stream.orthogonal(width)


def _gated_neurons(n: int, stream: Stream, rotate: bool) -> Views:
    order = permutation(stream.permutation(n))
    if not rotate:
        return {"gate": order, "up": order}
    factors = stream.signs(n) * _scales(n, stream)
    return {"gate": order, "up": order @ Monomial(n, factors=factors)}
