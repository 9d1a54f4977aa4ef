from __future__ import annotations

import numpy as np
import pytest

from anamorph.canary import paired_ratio
from anamorph.canary.sample import Sample
from anamorph.canary.window import LEAST_PAIRS, Pair, Window, by_length


def sample(scale: float) -> Sample:
    return Sample(((0.5 * scale, 1), (0.6 * scale, 1), (0.7 * scale, 1)), 0.8 * scale)


def pair(at: float, ratio: float = 1.0, length: int = 16) -> Pair:
    return Pair(at, length, sample(ratio), sample(1.0))


def test_no_ratio_from_a_handful() -> None:
    """Until there are ten pairs there is no interval that deserves the name."""
    window = Window(100, 50)
    for at in range(LEAST_PAIRS - 1):
        window.add(pair(at))
    assert window.now.ratios == {}
    window.add(pair(LEAST_PAIRS))
    assert window.now.ratios["tpot"].median == pytest.approx(1)


def test_the_window_slides() -> None:
    """What is older than the window says nothing any more, without a new pair, too."""
    window = Window(100, 1000)
    for at in range(60):
        window.add(pair(at, 2.0))
    for at in range(160, 180):
        window.add(pair(at, 1.0))
    assert window.now.ratios["ttft"].median == pytest.approx(1)
    assert len(window.now.pairs) == 20
    window.expire(1000)
    assert window.now.ratios == {}


def test_the_window_is_bounded() -> None:
    """However dense pairs are, so many are kept and no more."""
    window = Window(1e9, 12)
    for at in range(500):
        window.add(pair(at, at))
    assert [one.at for one in window.now.pairs] == list(range(488, 500))


def test_lengths_apart() -> None:
    """Pairs of all versions with prompts of one length have a ratio of their own."""
    windows = [Window(1e9, 100), Window(1e9, 100)]
    for at in range(10):
        windows[0].add(pair(at, 1.1, length=16))
        windows[1].add(pair(at, 1.3, length=256))
    found = by_length(windows)
    assert list(found) == [16, 256]
    assert found[256].ratios["ttft"].median == pytest.approx(1.3)


def test_interval_of_mixed_lengths_covers() -> None:
    """Over 100 experiments with two lengths the 95 % interval holds the true ratio 90 times at least."""
    rng, hits, lengths = np.random.default_rng(2), 0, [16] * 20 + [256] * 20
    for seed in range(100):
        pace = np.where(np.arange(40) < 20, 1.0, 9.0) * rng.lognormal(0, 1, 40)
        noise = rng.lognormal(0, 0.1, size=(2, 40))
        sides = (1.05 * pace * noise[0]).tolist(), (pace * noise[1]).tolist()
        ratio = paired_ratio(*sides, seed=seed, strata=lengths, resamples=2000)
        hits += ratio.low <= 1.05 <= ratio.high
    assert hits >= 90
