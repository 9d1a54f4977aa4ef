"""What a pool needs of an engine: slots that load, compute and forget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from anamorph.errors import ServiceError
from anamorph.serve.engines.base import Sampling, Token
from anamorph.wire.serving import PoolMember


@dataclass(frozen=True)
class Job:
    """One sequence of one member.

    Args:
        key_id: of the member whose endpoint took the request, never of a slot.
        stops: ids that end it, the member's own end-of-text ids included.
    """

    number: int
    key_id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    stops: frozenset[int]


@dataclass(frozen=True)
class Delivery:
    """What a step gave one sequence: tokens in order, or an error that ended it."""

    number: int
    tokens: tuple[Token, ...] = ()
    error: ServiceError | None = None


@dataclass(frozen=True)
class Opened:
    """A member whose replica is verified and fits its pool."""

    vocab_size: int
    context_length: int
    eos_ids: frozenset[int]


class Slot(Protocol):
    """Weights of one key at a time, and a cache that never outlives them.

    ``load`` runs on one thread and ``step`` on another, never both at once for one slot.
    """

    def load(self, key_id: str) -> int:
        """Replace weights and forget every sequence and cached block; returns the bytes copied.

        Raises:
            AnamorphError, OSError: the replica is gone or not what was verified; the slot is empty.
        """
        ...

    def add(self, job: Job) -> None:
        """Take a sequence.

        Raises:
            MixedKeys: it is of another key than the weights.
        """
        ...

    def cancel(self, number: int) -> None: ...

    def step(self) -> Sequence[Delivery]:
        """Compute the next token of the sequences inside.

        Raises:
            MixedKeys: one of them is of another key than the weights; nothing was computed.
        """
        ...


class Backend(Protocol):
    """Slots of one kind, and the host memory behind them."""

    def open(self, member: PoolMember) -> Opened:
        """Verify a member's replica; the first one decides the shapes that all others must have.

        Raises:
            ReplicaRefused: it does not verify.
            SetupError, UnsupportedModel: it does not fit this pool.
        """
        ...

    def slot(self, index: int) -> Slot:
        """A slot; there are some once a member is open."""
        ...

    def forget(self, key_id: str) -> None:
        """Free the host memory of a member."""
        ...

    def resident_bytes(self) -> int:
        """Bytes of replicas in host memory, beyond the slots."""
        ...

    def close(self) -> None: ...
