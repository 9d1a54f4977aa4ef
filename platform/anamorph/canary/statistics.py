"""How far apart two sides are and how sure that is, and whether the distance has changed.

The interval is a percentile interval of the paired bootstrap (Efron and Tibshirani, An
Introduction to the Bootstrap, 1993). The change is judged by Mood's median test in its
exact form: it asks on which side of the common median values lie and not how far away,
so a noisy hour, which spreads the ratios to both sides, is no change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """Encrypted over plaintext: the median of the pairs' ratios and its confidence interval."""

    median: float
    low: float
    high: float


def paired_ratio(
    encrypted: Sequence[float],
    plaintext: Sequence[float],
    *,
    seed: int,
    strata: Sequence[int] | None = None,
    resamples: int = RESAMPLES,
) -> Ratio:
    """Median of the pairwise ratios, with a percentile interval over resampled pairs.

    Pairs are drawn whole: the two requests of a pair ran back to back, so a
    machine that is slow for a while slows both and cancels out.

    Args:
        encrypted: one positive value per pair.
        plaintext: the same pairs' values on the other side.
        seed: of the resampling; equal inputs give equal intervals.
        strata: of each pair, its prompt's length; pairs are then drawn within each length, in
            the numbers that there are, so that the mixture is not part of the uncertainty.
        resamples: how many.
    """
    ratios = np.asarray(encrypted, dtype=np.float64) / np.asarray(plaintext, dtype=np.float64)
    rng = np.random.default_rng(seed)
    parts = _parts(ratios, strata)
    drawn = [part[rng.integers(0, part.size, size=(resamples, part.size))] for part in parts]
    medians = np.median(np.concatenate(drawn, axis=1), axis=1)
    low, high = np.quantile(medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def _parts(ratios: NDArray[np.float64], strata: Sequence[int] | None) -> list[NDArray[np.float64]]:
    if strata is None:
        return [ratios]
    of = np.asarray(strata)
    return [ratios[of == one] for one in np.unique(of)]


def median_test(recent: Sequence[float], history: Sequence[float]) -> float:
    """Two-sided p value of equal medians: how likely so uneven a split at the common median is by chance.

    Exact under the hypothesis (hypergeometric), whatever the distribution of the values is.

    Args:
        recent: independent values, at least one.
        history: likewise.
    """
    pooled = sorted([*recent, *history])
    middle = (pooled[(len(pooled) - 1) // 2] + pooled[len(pooled) // 2]) / 2
    above, drawn = sum(value > middle for value in pooled), len(recent)
    seen = sum(value > middle for value in recent)
    possible = range(max(0, drawn - (len(pooled) - above)), min(drawn, above) + 1)
    ways = {k: comb(above, k) * comb(len(pooled) - above, drawn - k) for k in possible}
    return sum(count for count in ways.values() if count <= ways[seen]) / comb(len(pooled), drawn)


def summary(values: Sequence[float], name: str) -> dict[str, float]:
    """Mean, median, deviation and p99 of seconds, in milliseconds, under ``vllm bench serve``'s names."""
    ms = np.asarray(values, dtype=np.float64) * 1000
    return {
        f"mean_{name}_ms": float(ms.mean()),
        f"median_{name}_ms": float(np.median(ms)),
        f"std_{name}_ms": float(ms.std()),
        f"p99_{name}_ms": float(np.quantile(ms, 0.99)),
    }
