"""How far apart two sides are, and how sure that is: the paired bootstrap.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), percentile intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """Encrypted over plaintext: the median of the pairs' ratios and its confidence interval."""

    median: float
    low: float
    high: float


def paired_ratio(encrypted: Sequence[float], plaintext: Sequence[float], *, seed: int) -> Ratio:
    """Median of the pairwise ratios, with a percentile interval over resampled pairs.

    Pairs are drawn whole: the two requests of a pair ran back to back, so a
    machine that is slow for a while slows both and cancels out.

    Args:
        encrypted: one positive value per pair.
        plaintext: the same pairs' values on the other side.
        seed: of the resampling; equal inputs give equal intervals.
    """
    ratios = np.asarray(encrypted, dtype=np.float64) / np.asarray(plaintext, dtype=np.float64)
    chosen = np.random.default_rng(seed).integers(0, ratios.size, size=(RESAMPLES, ratios.size))
    medians = np.median(ratios[chosen], axis=1)
    low, high = np.quantile(medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def summary(values: Sequence[float], name: str) -> dict[str, float]:
    """Mean, median, deviation and p99 of seconds, in milliseconds, under ``vllm bench serve``'s names."""
    ms = np.asarray(values, dtype=np.float64) * 1000
    return {
        f"mean_{name}_ms": float(ms.mean()),
        f"median_{name}_ms": float(np.median(ms)),
        f"std_{name}_ms": float(ms.std()),
        f"p99_{name}_ms": float(np.quantile(ms, 0.99)),
    }
