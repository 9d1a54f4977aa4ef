"""What is drawn commutes with what the network does, is well conditioned, and follows the specification."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anamorph.keys import Stream
from anamorph.models.groups import (
    AnyOrder,
    GatedNeurons,
    Group,
    HeadMaps,
    HeadOrder,
    Isometries,
    PairRotations,
)
from anamorph.plan.draw import PROFILES, Profile, Views, draw
from anamorph.plan.symmetry import Monomial

SIZES = {"hidden": 8, "ffn": 10, "vocab": 12, "kv_heads": 2, "copies": 3, "head_dim": 6, "heads": 6}
GROUPS: tuple[Group, ...] = (
    AnyOrder("vocab"),
    Isometries("hidden"),
    HeadOrder(),
    PairRotations(),
    HeadMaps(),
    GatedNeurons("ffn"),
)
SUBKEY = bytes(range(32))
Array = npt.NDArray[Any]
subkeys = st.binary(min_size=32, max_size=32)


def drawn(group: Group, profile: Profile, subkey: bytes = SUBKEY) -> Views:
    return draw(group, SIZES, Stream(subkey), profile)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("group", GROUPS, ids=lambda group: type(group).__name__)
@given(subkey=subkeys)
@settings(max_examples=20)
def test_every_factor_is_well_conditioned(group: Group, profile: Profile, subkey: bytes) -> None:
    """No factor stretches one direction more than four times as much as another."""
    views = drawn(group, profile, subkey)
    assert all(symmetry.condition() <= 4.0 + 1e-9 for symmetry in views.values())


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: type(group).__name__)
def test_views_have_the_length_that_the_table_expects(group: Group) -> None:
    """A drawn view acts on as many coordinates as the group says."""
    for profile in PROFILES:
        sizes = {name: symmetry.size for name, symmetry in drawn(group, profile).items()}
        assert sizes == group.views(SIZES)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: type(group).__name__)
def test_permute_draws_permutations_only(group: Group) -> None:
    """Nothing that ``permute`` draws ever touches a value."""
    for symmetry in drawn(group, "permute").values():
        assert isinstance(symmetry, Monomial)
        assert symmetry.moves_only


@pytest.mark.parametrize("profile", PROFILES)
def test_the_vocabulary_moves_alike_in_both_profiles(profile: Profile) -> None:
    """A codec needs no profile: the vocabulary is one permutation of the stream's first words."""
    image = Stream(SUBKEY).permutation(12)
    moved = drawn(AnyOrder("vocab"), profile)[""].act(np.arange(12))
    np.testing.assert_array_equal(moved[image], np.arange(12))


@given(subkey=subkeys)
def test_isometries_keep_lengths(subkey: bytes) -> None:
    """A norm without gain divides by the length, and no isometry changes it."""
    matrix = drawn(Isometries("hidden"), "rotate", subkey)[""].matrix()
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(8), atol=1e-12)


def rope(x: Array, position: int) -> Array:
    """RoPE in Hugging Face's half-split layout. Shape (…, head_dim)."""
    half = x.shape[-1] // 2
    angle = position * 10000.0 ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    turned = (first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle))
    return np.concatenate(turned, axis=-1)


@given(subkey=subkeys, query_at=st.integers(0, 5000), key_at=st.integers(0, 5000))
@settings(max_examples=20)
def test_rotated_pairs_leave_attention_scores_alone(subkey: bytes, query_at: int, key_at: int) -> None:
    """Keys by g and queries by its dual: every score of every query head, at any position, stays."""
    views = drawn(PairRotations(), "rotate", subkey)
    random = np.random.default_rng(0)
    keys, queries = random.normal(size=(2, 6)), random.normal(size=(2, 3, 6))
    moved_keys = views["kv"].act(keys.reshape(-1)).reshape(2, 6)
    moved_queries = views["query"].dual().act(queries.reshape(-1)).reshape(2, 3, 6)
    before = np.einsum("gqd,gd->gq", rope(queries, query_at), rope(keys, key_at))
    after = np.einsum("gqd,gd->gq", rope(moved_queries, query_at), rope(moved_keys, key_at))
    np.testing.assert_allclose(after, before, atol=1e-10)


@given(subkey=subkeys)
def test_query_heads_stay_with_their_key_value_head(subkey: bytes) -> None:
    """After the heads have moved, each group of query heads still sits where its key-value head does."""
    views = drawn(HeadOrder(), "rotate", subkey)
    kv = views["kv"].act(np.repeat(np.arange(2), 6)).reshape(2, 6)[:, 0]
    queries = views["query"].act(np.repeat(np.arange(6), 6)).reshape(2, 3, 6)[:, :, 0]
    np.testing.assert_array_equal(queries // 3, np.repeat(kv[:, None], 3, axis=1))


def test_heads_move_whole() -> None:
    """Inside a head nothing changes its place."""
    inside = drawn(HeadOrder(), "rotate")["query"].act(np.tile(np.arange(6), 6))
    np.testing.assert_array_equal(inside, np.tile(np.arange(6), 6))


@pytest.mark.parametrize("profile", PROFILES)
@given(subkey=subkeys)
@settings(max_examples=20)
def test_a_head_map_is_undone_on_every_query_head(profile: Profile, subkey: bytes) -> None:
    """What the output projection consumes, by the dual, is what the values produced."""
    views = drawn(HeadMaps(), profile, subkey)
    random = np.random.default_rng(0)
    values, output = random.normal(size=(2, 6)), random.normal(size=(2, 3, 6))
    moved = views["kv"].act(values.reshape(-1)).reshape(2, 1, 6)
    consumed = views["query"].dual().act(output.reshape(-1)).reshape(2, 3, 6)
    np.testing.assert_allclose((consumed * moved).sum(-1), (output * values[:, None]).sum(-1), atol=1e-10)


@pytest.mark.parametrize("profile", PROFILES)
@given(subkey=subkeys)
@settings(max_examples=20)
def test_gated_neurons_commute_with_their_nonlinearity(profile: Profile, subkey: bytes) -> None:
    """act(gate) · up moves as ``up`` does, when gate and up move as their views say."""
    views = drawn(GatedNeurons("ffn"), profile, subkey)
    random = np.random.default_rng(0)
    gate, up = random.normal(size=10), random.normal(size=10)
    moved = np.tanh(views["gate"].act(gate)) * views["up"].act(up)
    np.testing.assert_allclose(moved, views["up"].act(np.tanh(gate) * up), atol=1e-12)


def test_rotations_follow_the_specified_order_of_draws() -> None:
    """All angles, then all scales, key-value head by head: written out from the specification."""
    stream = Stream(SUBKEY)
    angles = 2 * np.pi * stream.uniforms(6).reshape(2, 3)
    scales = 2.0 ** (2 * stream.uniforms(6).reshape(2, 3) - 1)
    expected = np.zeros((12, 12))
    for head in range(2):
        for pair in range(3):
            i, j = 6 * head + pair, 6 * head + pair + 3
            cos, sin = np.cos(angles[head, pair]), np.sin(angles[head, pair])
            expected[np.ix_((i, j), (i, j))] = scales[head, pair] * np.array([[cos, -sin], [sin, cos]])
    np.testing.assert_allclose(drawn(PairRotations(), "rotate")["kv"].matrix(), expected, atol=1e-12)


def test_head_maps_follow_the_specified_order_of_draws() -> None:
    """Per key-value head: left rotation, scales, right rotation."""
    stream, expected = Stream(SUBKEY), np.zeros((12, 12))
    for head in range(2):
        left = stream.orthogonal(6)
        scales = np.diag(2.0 ** (2 * stream.uniforms(6) - 1))
        block = slice(6 * head, 6 * head + 6)
        expected[block, block] = left @ scales @ stream.orthogonal(6)
    np.testing.assert_allclose(drawn(HeadMaps(), "rotate")["kv"].matrix(), expected, atol=1e-12)


def test_head_order_follows_the_specified_order_of_draws() -> None:
    """The order of key-value heads, then one order per group in plain order."""
    stream = Stream(SUBKEY)
    order = stream.permutation(2)
    inside = [stream.permutation(3) for _ in range(2)]
    moved = drawn(HeadOrder(), "rotate")["query"].act(np.repeat(np.arange(6), 6))[::6]
    for group in range(2):
        for head in range(3):
            assert moved[order[group] * 3 + inside[group][head]] == group * 3 + head


def test_neurons_follow_the_specified_order_of_draws() -> None:
    """Order, signs, scales; sign and scale belong to the neuron's plain place."""
    stream = Stream(SUBKEY)
    image, signs = stream.permutation(10), stream.signs(10)
    scales = 2.0 ** (2 * stream.uniforms(10) - 1)
    moved = drawn(GatedNeurons("ffn"), "rotate")["up"].act(np.ones(10))
    np.testing.assert_allclose(moved[image], signs * scales)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: type(group).__name__)
def test_another_subkey_draws_another_element(group: Group) -> None:
    """Symmetries come from the key and from nothing else."""
    view = list(group.views(SIZES))[-1]
    same, again = drawn(group, "rotate")[view].matrix(), drawn(group, "rotate")[view].matrix()
    np.testing.assert_array_equal(same, again)
    assert not np.array_equal(same, drawn(group, "rotate", bytes(32))[view].matrix())
