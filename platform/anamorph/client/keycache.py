"""What a client holds for a while: the key version in use and its inference token.

Both have a hard end, at which they are dropped whether or not anybody asks, and a
soft one before it, after which the next request renews them: so that a key service
that is away for a moment does not stop a client that still has a valid key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from anamorph.client.codec import TokenCodec
from anamorph.wire.admin import ModelRead

T = TypeVar("T")

Cancel = Callable[[], None]
After = Callable[[float, Callable[[], None]], Cancel]
"""``after(seconds, do)`` arranges a call and returns what calls it off again."""


@dataclass(frozen=True)
class Lease:
    """The key version in use: its codec, where it is served, and the model's record."""

    codec: TokenCodec
    endpoint: str
    model: ModelRead
    version: int

    @property
    def key_id(self) -> str:
        """Key id of this version."""
        return self.codec.key_id


@dataclass(frozen=True)
class Held(Generic[T]):
    """Something kept until ``expires_at``, and renewed from ``renew_at`` on (clock seconds)."""

    value: T = field(repr=False)
    expires_at: float
    renew_at: float


class Holder(Generic[T]):
    """Keeps one ``Held`` until its hard end and no longer.

    Args:
        clock: seconds since the epoch.
        after: timer that drops the value at its end even if nobody asks for it.
    """

    def __init__(self, clock: Callable[[], float], after: After) -> None:
        self._clock = clock
        self._after = after
        self._held: Held[T] | None = None
        self._cancel: Cancel | None = None

    def get(self) -> Held[T] | None:
        """What is held, or ``None`` once it has expired."""
        held = self._held
        if held is not None and self._clock() >= held.expires_at:
            self.drop()
            return None
        return held

    def put(self, held: Held[T]) -> None:
        """Hold ``held`` in place of anything before it."""
        self.drop()
        self._held = held
        self._cancel = self._after(max(held.expires_at - self._clock(), 0), lambda: self._end(held))

    def drop(self) -> None:
        """Hold nothing."""
        self._held = None
        cancel, self._cancel = self._cancel, None
        if cancel is not None:
            cancel()

    def _end(self, held: Held[T]) -> None:
        if self._held is held:
            # The timer goes too: it refers to what it was set for.
            self._held = self._cancel = None
