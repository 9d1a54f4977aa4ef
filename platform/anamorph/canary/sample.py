"""One streamed request against one endpoint, timed where its tokens arrive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import httpx

from anamorph.errors import StreamInterrupted
from anamorph.telemetry import Protection
from anamorph.wire.completions import stream

Clock = Callable[[], float]


@dataclass(frozen=True)
class Target:
    """An endpoint to measure: ``endpoint`` is its URL without ``/v1``, ``key_id`` is absent in clear."""

    endpoint: str
    token: str = field(repr=False)
    key_id: str | None = None

    @property
    def protection(self) -> Protection:
        """What the endpoint computes on."""
        return "plaintext" if self.key_id is None else "encrypted"


@dataclass(frozen=True)
class Sample:
    """Moments of one answer, in seconds from its request; ``arrivals`` is (moment, tokens) per chunk."""

    arrivals: tuple[tuple[float, int], ...]
    ended: float

    @property
    def tokens(self) -> int:
        """Output tokens."""
        return sum(count for _, count in self.arrivals)

    @property
    def ttft(self) -> float:
        """Time to first token, seconds."""
        return self.arrivals[0][0]

    @property
    def e2el(self) -> float:
        """End-to-end latency: until the stream's end, seconds."""
        return self.ended

    @property
    def tpot(self) -> float:
        """Time per output token, seconds: all tokens but the first, over the time after the first."""
        return (self.arrivals[-1][0] - self.ttft) / (self.tokens - 1)

    @property
    def itl(self) -> tuple[float, ...]:
        """Inter-token latencies: gaps between chunks, seconds."""
        moments = [moment for moment, _ in self.arrivals]
        return tuple(after - before for before, after in pairwise(moments))

    @property
    def throughput(self) -> float:
        """Output tokens per second of the whole request."""
        return self.tokens / self.e2el


def take(http: httpx.Client, target: Target, prompt: list[int], output_tokens: int, clock: Clock) -> Sample:
    """Stream ``output_tokens`` tokens for ``prompt`` and time them.

    End-of-text is ignored, so that both sides do the same amount of work.

    Raises:
        ServiceError: the endpoint refused.
        StreamInterrupted: it answered another number of tokens, or in one piece: nothing to compare.
    """
    request = {"prompt": prompt, "max_tokens": output_tokens, "temperature": 0.0, "ignore_eos": True}
    arrivals: list[tuple[float, int]] = []
    began = clock()
    for chunk in stream(http, target.endpoint, request, token=target.token, key_id=target.key_id):
        count = sum(len(choice.token_ids) for choice in chunk.choices)
        if count:
            arrivals.append((clock() - began, count))
    sample = Sample(tuple(arrivals), clock() - began)
    if len(arrivals) < 2:
        raise StreamInterrupted(f"the {target.protection} endpoint does not stream: nothing to time")
    if sample.tokens != output_tokens:
        raise StreamInterrupted(
            f"the {target.protection} endpoint answered {sample.tokens} tokens instead of {output_tokens}"
        )
    return sample
