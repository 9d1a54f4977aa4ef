"""The run itself: pairs of requests, interleaved, never one prompt to both sides."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx
import numpy as np

from anamorph.canary.report import OverheadReport
from anamorph.canary.sample import Clock, Sample, Target, take


def random_ids(rng: np.random.Generator, vocab_size: int, length: int) -> list[int]:
    """``length`` independent ids, uniform over the vocabulary."""
    return [int(token) for token in rng.integers(0, vocab_size, size=length)]


def measure(
    encrypted: Target,
    plaintext: Target,
    *,
    model: str,
    vocab_size: int,
    http: httpx.Client,
    pairs: int = 20,
    prompt_tokens: int = 64,
    output_tokens: int = 32,
    warmup: int = 2,
    rng: np.random.Generator | None = None,
    clock: Clock = time.perf_counter,
    progress: Callable[[int, int], None] | None = None,
) -> OverheadReport:
    """Measure what encryption costs: the same load on both endpoints, in turn.

    Each pair is two prompts of equal length, drawn independently and uniformly,
    one per side: a prompt sent to both would be known plaintext for whoever reads
    the traffic. Which side goes first is drawn per pair, requests run one at a
    time, and both sides answer exactly ``output_tokens`` tokens.

    Args:
        encrypted: endpoint of one key version; the random ids count as encrypted already.
        plaintext: endpoint of the unencrypted base.
        model: name for the report.
        vocab_size: number of ids of both.
        http: client with the caller's timeouts.
        pairs: measured pairs; at least 2.
        prompt_tokens: ids per prompt.
        output_tokens: tokens per answer; at least 2, since TPOT leaves the first one out.
        warmup: pairs that run first and are not counted.
        rng: source of prompts and order; fresh entropy if absent.
        clock: monotonic seconds.
        progress: called with (pairs done, pairs in all) after each pair.

    Raises:
        ValueError: a size is too small, or the targets are not one of each kind.
        ServiceError: an endpoint refused.
        StreamInterrupted: an answer was not complete.
    """
    _check(encrypted, plaintext, pairs, output_tokens, prompt_tokens, vocab_size)
    drawn = rng or np.random.default_rng()
    began = clock()
    samples: list[tuple[Sample, Sample]] = []
    for number in range(warmup + pairs):
        size = Size(vocab_size, prompt_tokens, output_tokens)
        samples.append(take_pair(http, (encrypted, plaintext), size, drawn, clock))
        if progress is not None:
            progress(number + 1, warmup + pairs)
    counted = samples[warmup:]
    return OverheadReport(
        model=model,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        encrypted=tuple(sample for sample, _ in counted),
        plaintext=tuple(sample for _, sample in counted),
        duration=clock() - began,
    )


def _check(
    encrypted: Target, plaintext: Target, pairs: int, output_tokens: int, prompt_tokens: int, vocab_size: int
) -> None:
    if encrypted.key_id is None or plaintext.key_id is not None:
        raise ValueError("the encrypted target needs a key id, and the plaintext target has none")
    if pairs < 2 or output_tokens < 2 or prompt_tokens < 1 or vocab_size < 2:
        raise ValueError("at least 2 pairs, 2 output tokens, 1 prompt token and 2 ids are needed")


def _two_prompts(rng: np.random.Generator, vocab_size: int, length: int) -> tuple[list[int], list[int]]:
    first = random_ids(rng, vocab_size, length)
    second = random_ids(rng, vocab_size, length)
    while second == first:  # only a tiny vocabulary gets here
        second = random_ids(rng, vocab_size, length)
    return first, second


@dataclass(frozen=True)
class Size:
    """Of one pair: ids are below ``vocab_size``, both prompts and both answers have one length."""

    vocab_size: int
    prompt_tokens: int
    output_tokens: int


def take_pair(
    http: httpx.Client, targets: tuple[Target, Target], size: Size, rng: np.random.Generator, clock: Clock
) -> tuple[Sample, Sample]:
    """Both requests of one pair, in drawn order, each with ids of its own.

    Args:
        http: client with the caller's timeouts.
        targets: encrypted, plaintext.
        size: of the pair.
        rng: source of prompts and order.
        clock: monotonic seconds.

    Returns:
        Samples of (encrypted, plaintext).

    Raises:
        ServiceError: an endpoint refused.
        StreamInterrupted: an answer was not complete.
    """
    prompts = _two_prompts(rng, size.vocab_size, size.prompt_tokens)
    order = (0, 1) if rng.integers(2) else (1, 0)
    taken = {side: take(http, targets[side], prompts[side], size.output_tokens, clock) for side in order}
    return taken[0], taken[1]
