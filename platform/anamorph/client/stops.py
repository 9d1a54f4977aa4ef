"""Stop strings in text that arrives in pieces: nothing of them is given out, nothing else is held back."""

from __future__ import annotations

from collections.abc import Sequence


class StopFinder:
    """Finds the first stop string of one answer.

    The first is the one that is complete first, as it would be found if the whole text
    were searched again after every character; of several complete at the same
    character, the one that starts first.

    Args:
        stops: non-empty strings; none of them appears in the text given out.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Text that is certainly before any stop string; all of it, once one is found."""
        if self.found:
            return ""
        self._held += text
        cut = self._first()
        if cut is not None:
            self.found = True
            out, self._held = self._held[:cut], ""
            return out
        keep = self._possible_start()
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        out, self._held = self._held, ""
        return out

    def _first(self) -> int | None:
        """Where the stop string that is complete first starts."""
        starts = [(self._held.find(stop), len(stop)) for stop in self._stops]
        hits = [(start + length, start) for start, length in starts if start >= 0]
        return min(hits)[1] if hits else None

    def _possible_start(self) -> int:
        """Length of the longest end of the text that a stop string may begin with."""
        return max((_overlap(self._held, stop) for stop in self._stops), default=0)


def _overlap(text: str, stop: str) -> int:
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
