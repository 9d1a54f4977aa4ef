"""Opened roots, kept for a while so that not every release asks the key-management service.

Whoever uses a root from here has checked the version's state in the database first: the
cache only says what a ciphertext opens to, never that it may be released.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

MOST = 4096
LONGEST_S = 600.0


@dataclass(frozen=True)
class _Kept:
    ends_at: float
    ciphertext: bytes
    root: bytes = field(repr=False)


class RootCache:
    """Least recently used roots, by key id. Bounded in number and age.

    Args:
        most: roots kept at a time.
        longest_s: seconds after which a root is opened again; 600 at most.
        clock: monotonic seconds.
    """

    def __init__(
        self, *, most: int = MOST, longest_s: float = LONGEST_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most, self._longest_s, self._clock = most, min(longest_s, LONGEST_S), clock
        self._roots: OrderedDict[str, _Kept] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key_id: str, ciphertext: bytes) -> bytes | None:
        """What ``ciphertext`` opens to, if it was opened for this key lately."""
        with self._lock:
            kept = self._roots.pop(key_id, None)
            if kept is None or kept.ends_at <= self._clock() or kept.ciphertext != ciphertext:
                return None
            self._roots[key_id] = kept
            return kept.root

    def put(self, key_id: str, ciphertext: bytes, root: bytes) -> None:
        """Keep a root; one that is kept already grows no younger by it."""
        with self._lock:
            kept = self._roots.get(key_id)
            if kept is None or kept.ciphertext != ciphertext or kept.ends_at <= self._clock():
                self._roots[key_id] = _Kept(self._clock() + self._longest_s, ciphertext, root)
            self._roots.move_to_end(key_id)
            while len(self._roots) > self._most:
                self._roots.popitem(last=False)

    def drop_old(self) -> None:
        """Forget what is too old, used or not."""
        now = self._clock()
        with self._lock:
            for key_id in [known for known, kept in self._roots.items() if kept.ends_at <= now]:
                del self._roots[key_id]
