"""The last pairs of one key version, and what follows from them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from anamorph.canary.report import MEASURES, values
from anamorph.canary.sample import Sample
from anamorph.canary.statistics import Ratio, paired_ratio

# An interval over fewer pairs is an interval in name only.
LEAST_PAIRS = 10
# Renewed with every pair: a fifth of a report's resamples moves its ends by a thousandth of its width.
_RESAMPLES = 2_000


@dataclass(frozen=True)
class Pair:
    """Two requests of equal size, one after the other; ``at`` is when, in the clock of the canary."""

    at: float
    length: int
    encrypted: Sample
    plaintext: Sample

    def ratio(self, measure: str) -> float:
        """Encrypted over plaintext."""
        return float(getattr(self.encrypted, measure) / getattr(self.plaintext, measure))


@dataclass(frozen=True)
class Pairs:
    """Some pairs and their ratios."""

    pairs: tuple[Pair, ...]

    @cached_property
    def ratios(self) -> dict[str, Ratio]:
        """Ratio of each measure; none from fewer than ``LEAST_PAIRS``."""
        return {} if len(self.pairs) < LEAST_PAIRS else {name: self._ratio(name) for name in MEASURES}

    def _ratio(self, measure: str) -> Ratio:
        return paired_ratio(
            values([pair.encrypted for pair in self.pairs], measure),
            values([pair.plaintext for pair in self.pairs], measure),
            seed=0,
            strata=[pair.length for pair in self.pairs],
            resamples=_RESAMPLES,
        )


class Window:
    """The pairs of the last ``seconds``, at most ``most``.

    Args:
        seconds: older pairs fall out.
        most: so do the oldest beyond this number.
    """

    def __init__(self, seconds: float, most: int) -> None:
        self._seconds = seconds
        self._pairs: deque[Pair] = deque(maxlen=most)
        self.now = Pairs(())

    def add(self, pair: Pair) -> None:
        """Take a pair; what is too old beside it falls out."""
        self._pairs.append(pair)
        self.expire(pair.at)

    def expire(self, now: float) -> None:
        """Drop what is too old."""
        while self._pairs and now - self._pairs[0].at > self._seconds:
            self._pairs.popleft()
        if self.now.pairs != tuple(self._pairs):
            self.now = Pairs(tuple(self._pairs))


def by_length(windows: Iterable[Window]) -> dict[int, Pairs]:
    """The pairs of all windows by the length of their prompts."""
    found: dict[int, list[Pair]] = {}
    for window in windows:
        for pair in window.now.pairs:
            found.setdefault(pair.length, []).append(pair)
    return {length: Pairs(tuple(pairs)) for length, pairs in sorted(found.items())}
