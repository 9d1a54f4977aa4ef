"""The arithmetic of sampling, without a model."""

from __future__ import annotations

import hashlib
import math
import struct
from typing import Any

import pytest
import torch

from anamorph.serve.engines.base import Sampling
from anamorph.serve.engines.sampler import Drawn, Row, choose, gumbel

MASK = 2**64 - 1


def splitmix64(state: int) -> int:
    """The published generator, in plain integers."""
    z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def row(position: int = 0, **options: Any) -> Row:
    return Row(Drawn(Sampling(max_tokens=9, **options), prompt_length=3), position)


def test_noise_is_splitmix64_in_plain_integers() -> None:
    """Seeds keep their meaning across machines and releases: the noise is pinned to its definition."""
    seeds = [0, 1, -1, 2**62, -(2**63)]
    noise = gumbel(seeds, 5, torch.device("cpu"))
    for seed, values in zip(seeds, noise.tolist(), strict=True):
        for i, value in enumerate(values, start=1):
            word = splitmix64((seed + i * 0x9E3779B97F4A7C15) & MASK)
            uniform = ((word >> 12) + 0.5) * 2.0**-52
            assert value == pytest.approx(-math.log(-math.log(uniform)), rel=1e-12)


def test_the_same_seed_gives_the_same_token_in_this_and_every_release() -> None:
    """The path from seed, sequence and position to noise is pinned too."""
    packed = hashlib.blake2b(struct.pack("<qqq", 7, 2, 5), digest_size=8).digest()
    noise = gumbel([int.from_bytes(packed, "little", signed=True)], 50, torch.device("cpu"))
    scores = torch.linspace(-1, 1, 50)[None]
    chosen = choose(scores, [row(5, seed=7, index=2)])
    assert int(chosen[0]) == int((scores.double() + noise).argmax())


def test_draws_follow_the_softmax() -> None:
    """Over 4,000 positions the frequencies are those of softmax(logits / temperature), within 4 sigma."""
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0, -3.0]])
    count = 4000
    rows = [row(i, seed=11, temperature=0.8) for i in range(count)]
    drawn = torch.bincount(choose(scores.expand(count, -1), rows), minlength=5)
    truth = torch.softmax(scores[0] / 0.8, -1)
    sigma = (count * truth * (1 - truth)).sqrt()
    assert ((drawn - count * truth).abs() < 4 * sigma + 1).all()


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.6}, {0}),
        ({"top_p": 0.7}, {0, 1}),
        ({"top_k": 3, "top_p": 0.999}, {0, 1, 2}),
        ({"top_k": 10**30}, {0, 1, 2, 3}),
    ],
)
def test_top_k_and_top_p_keep_what_they_say(options: dict[str, Any], allowed: set[int]) -> None:
    """The k most likely, then the fewest whose share reaches p; every one of those does occur."""
    scores = torch.tensor([[0.64, 0.23, 0.08, 0.05]]).log()
    count = 800
    drawn = choose(scores.expand(count, -1), [row(i, temperature=1.0, **options) for i in range(count)])
    assert set(drawn.tolist()) == allowed


def test_rows_do_not_see_each_other() -> None:
    """A row's token is the same alone and among rows with every other option."""
    torch.manual_seed(0)
    scores = torch.randn(6, 300)
    rows = [
        row(temperature=0.0),
        row(temperature=0.0, logit_bias={5: 100.0}),
        row(temperature=2.0, top_k=3, seed=1),
        row(temperature=0.7, top_p=0.4, seed=2),
        row(temperature=1.0, seed=3, logprobs=20),
        row(temperature=1.0, seed=3, index=1, logit_bias={7: -100.0}),
    ]
    together = choose(scores, [*rows]).tolist()
    alone = [int(choose(scores[i : i + 1], [one])[0]) for i, one in enumerate(rows)]
    assert together == alone


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_marked_and_harms_nobody(bad: float) -> None:
    """The request of a broken row fails; the rows beside it are chosen as ever."""
    scores = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    before = choose(scores, [row(temperature=1.0, seed=i) for i in range(3)]).tolist()
    scores[1, 4] = bad
    rows = [row(temperature=1.0, seed=i) for i in range(3)]
    after = choose(scores, rows).tolist()
    assert [r.drawn.broken for r in rows] == [False, True, False]
    assert (after[0], after[2]) == (before[0], before[2])
