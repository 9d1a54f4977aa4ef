"""What is drawn from a stream."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anamorph.errors import InvalidKey
from anamorph.keys import Stream
from anamorph.keys.draw import STREAM_WORDS

subkeys = st.binary(min_size=32, max_size=32)
lengths = st.integers(0, 200)


@given(subkeys, lengths, lengths)
def test_words_continue(subkey: bytes, first: int, second: int) -> None:
    """Words drawn in two calls are the words drawn in one, also across block boundaries."""
    stream = Stream(subkey)
    parts = np.concatenate([stream.words(first), stream.words(second)])
    assert np.array_equal(parts, Stream(subkey).words(first + second))


@given(subkeys, lengths)
def test_permutation_is_one(subkey: bytes, n: int) -> None:
    """A permutation holds every index once and sorts the words it was drawn from."""
    image = Stream(subkey).permutation(n)
    words = Stream(subkey).words(n)[image]
    assert sorted(image.tolist()) == list(range(n))
    assert all(a <= b for a, b in itertools.pairwise(words.tolist()))


@given(subkeys, lengths)
def test_signs_and_uniforms_are_in_range(subkey: bytes, n: int) -> None:
    """Signs are ±1; uniforms are multiples of 2^-53 in [0, 1)."""
    uniforms = Stream(subkey).uniforms(n)
    assert set(Stream(subkey).signs(n).tolist()) <= {-1.0, 1.0}
    assert all(0 <= u < 1 and (u * 2**53).is_integer() for u in uniforms.tolist())


@given(subkeys, lengths, lengths)
def test_normals_continue_at_even_counts(subkey: bytes, first: int, second: int) -> None:
    """Normals drawn in two calls are those of one call when the first takes whole pairs."""
    stream = Stream(subkey)
    parts = np.concatenate([stream.normals(2 * first), stream.normals(second)])
    assert np.array_equal(parts, Stream(subkey).normals(2 * first + second))


@pytest.mark.parametrize("n", [1, 2, 3, 8, 33, 64])
def test_orthogonal_is_the_positive_qr_factor(n: int) -> None:
    """Q is orthogonal and Qᵀ·A is upper triangular with a positive diagonal, A being the normals."""
    q = Stream(bytes([n]) * 32).orthogonal(n)
    r = q.T @ Stream(bytes([n]) * 32).normals(n * n).reshape(n, n)
    assert np.allclose(q @ q.T, np.eye(n), rtol=0, atol=1e-13)
    assert np.allclose(np.tril(r, -1), 0, rtol=0, atol=1e-12)
    assert (np.diagonal(r) > 0).all()


def test_orthogonal_takes_both_determinants() -> None:
    """Rotations and reflections are both drawn: the group is O(n), not SO(n)."""
    signs = {round(float(np.linalg.det(Stream(bytes([k]) * 32).orthogonal(3)))) for k in range(32)}
    assert signs == {-1, 1}


def test_normals_are_standard() -> None:
    """Mean, variance, fourth moment and distribution of 200,000 normals are those of N(0, 1)."""
    z = Stream(bytes(32)).normals(200_000)
    below = [float((z < x).mean()) for x in (-2.0, -1.0, 0.0, 1.0, 2.0)]
    expected = [0.5 * (1 + math.erf(x / math.sqrt(2))) for x in (-2.0, -1.0, 0.0, 1.0, 2.0)]
    assert abs(z.mean()) < 0.01
    assert abs(z.var() - 1) < 0.02
    assert abs((z**4).mean() - 3) < 0.1
    assert np.allclose(below, expected, rtol=0, atol=0.005)


def test_permutations_are_uniform() -> None:
    """Of 24,000 draws each of the 24 permutations of 4 is about as frequent (χ², 23 degrees of freedom)."""
    source = Stream(bytes(32))
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(24_000):
        image = tuple(source.permutation(4).tolist())
        counts[image] = counts.get(image, 0) + 1
    chi_squared = sum((count - 1000) ** 2 / 1000 for count in counts.values())
    assert len(counts) == 24
    assert chi_squared < 49.7  # exceeded once in a thousand


@pytest.mark.parametrize("subkey", [b"", bytes(31), bytes(33), "0" * 32, bytearray(32)])
def test_malformed_subkey_is_refused(subkey: bytes) -> None:
    """A stream needs exactly 32 bytes."""
    with pytest.raises(InvalidKey):
        Stream(subkey)


@pytest.mark.parametrize("n", [-1, STREAM_WORDS + 1])
def test_stream_has_an_end(n: int) -> None:
    """A draw of a negative number of words, or past the last block, is refused instead of repeating words."""
    with pytest.raises(InvalidKey):
        Stream(bytes(32)).words(n)


def test_stream_counts_what_it_gave() -> None:
    """The end of the stream is counted from its beginning, not from the last draw."""
    stream = Stream(bytes(32))
    stream.words(1)
    with pytest.raises(InvalidKey):
        stream.words(STREAM_WORDS)
