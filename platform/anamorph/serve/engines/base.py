"""What every engine offers: encrypted ids in, encrypted ids out, one sequence at a time."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How one sequence is drawn. Engines rely on these values: they are checked before.

    Args:
        max_tokens: most tokens to generate, at least 1.
        temperature: 0 is greedy; then ``top_p``, ``top_k`` and ``seed`` mean nothing.
        top_p: in (0, 1]; 1 keeps every token.
        top_k: 0 keeps every token.
        seed: any signed 64-bit number; the same seed gives the same tokens whatever else is batched.
        index: which of a request's ``n`` sequences this is; each has its own noise.
        logprobs: how many of the most likely tokens to report beside the chosen one; None reports nothing.
        logit_bias: encrypted id → what is added to its logit.
        stop_ids: ids that end the sequence, besides the model's own end-of-text ids.
        ignore_eos: the model's end-of-text ids do not end the sequence.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    index: int = 0
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False


@dataclass(frozen=True)
class Token:
    """One generated token; the last one of a sequence carries ``finish``.

    A token that stops the sequence is delivered like any other. ``logprob`` and
    ``top`` are of the model's own distribution, before bias and temperature. A sequence's
    first token says when its computation began (``time.perf_counter``), where the engine knows.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: FinishReason | None = None
    began: float | None = None


@dataclass(frozen=True)
class Load:
    """Sequences inside an engine: being computed, and waiting for a place in the batch."""

    running: int
    waiting: int


class Engine(Protocol):
    """A loaded model. ``vocab_size`` bounds ids, ``context_length`` bounds prompt and answer together."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def context_length(self) -> int: ...

    @property
    def eos_ids(self) -> frozenset[int]: ...

    def submit(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Token, None]:
        """Generate one sequence; closing the generator cancels it in the engine.

        Raises:
            Unavailable: the engine failed, before or while it answered.
        """
        ...

    def healthy(self) -> bool:
        """Whether the engine computes: its thread lives and steps complete."""
        ...

    def load(self) -> Load: ...

    def close(self) -> None:
        """Stop computing and free what is held; what is still running fails."""
        ...


def finish_reason(
    token: int, produced: int, stop_ids: frozenset[int], max_tokens: int
) -> FinishReason | None:
    """Whether the ``produced``-th token ends its sequence, and why."""
    if token in stop_ids:
        return "stop"
    return "length" if produced >= max_tokens else None
