"""The drift alarm: what encryption costs has changed against its own history.

Ratios come in batches. Each full batch is compared once with what came before, by
``median_test`` at level ``alpha``; a change that is smaller than ``least`` raises no alarm
however certain it is. While nothing changes, a batch raises a false alarm with a
probability of at most ``alpha``, whatever the noise: with the defaults and a pair every two
minutes that is one in four months for each measure of a version.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import log
from statistics import median

from anamorph.canary.statistics import median_test


@dataclass
class Drift:
    """Watches one ratio.

    Args:
        batch: ratios that are judged together.
        history: most earlier ratios that they are compared with; judging begins at ``batch`` of them.
        alpha: probability of a false alarm, for each batch.
        least: relative change below which there is no alarm.
        settle: so many changed batches in a row become the new history: the alarm has been heard.
    """

    batch: int = 30
    history: int = 300
    alpha: float = 0.0003
    least: float = 0.02
    settle: int = 24
    drifting: bool = False
    change: float = 1.0
    """The last batch's median over the history's."""
    _recent: list[float] = field(default_factory=list)
    _changed: list[float] = field(default_factory=list)
    _history: deque[float] = field(default_factory=deque)

    def add(self, ratio: float) -> None:
        """Take one ratio; a full batch is judged."""
        self._recent.append(ratio)
        if len(self._recent) < self.batch:
            return
        batch, self._recent = self._recent, []
        self.drifting = len(self._history) >= self.batch and self._differs(batch)
        # What is under suspicion does not become the measure of what follows.
        if not self.drifting:
            self._changed = []
            self._keep(batch)
            return
        self._changed += batch
        if len(self._changed) >= self.settle * self.batch:
            self._history.clear()
            self._keep(self._changed)
            self._changed, self.drifting = [], False

    def _differs(self, batch: list[float]) -> bool:
        self.change = median(batch) / median(self._history)
        if abs(log(self.change)) < log(1 + self.least):
            return False
        return median_test(batch, list(self._history)) < self.alpha

    def _keep(self, ratios: list[float]) -> None:
        self._history.extend(ratios)
        while len(self._history) > self.history:
            self._history.popleft()
