"""A deterministic engine without a model: for tests of everything around engines.

Its answer depends on the key id and all ids before it, so an answer under a wrong
key, to a wrong prompt or with a token missing is recognised by whoever knows
``continuation``. Imports neither torch nor Ray.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Iterator, Sequence

from anamorph.serve.engines.base import Load, Sampling, Token, finish_reason


def continuation(key_id: str, prompt: Sequence[int], n: int, vocab_size: int) -> list[int]:
    """The ``n`` ids that the fake engine answers; prefix-consistent, as greedy decoding is.

    Args:
        key_id: key id of the application; ``plaintext`` for a baseline.
        prompt: encrypted ids.
        n: how many ids.
        vocab_size: ids are below it.
    """
    ids = chain(key_id, prompt, vocab_size)
    return [next(ids) for _ in range(n)]


def chain(key_id: str, prompt: Sequence[int], vocab_size: int) -> Iterator[int]:
    """``continuation`` without an end."""
    state = hashlib.sha256(key_id.encode())
    for token in prompt:
        state.update(token.to_bytes(8, "big"))
    while True:
        token = int.from_bytes(state.digest()[:8], "big") % vocab_size
        yield token
        state.update(token.to_bytes(8, "big"))


class FakeEngine:
    """Answers with ``continuation``, whatever the sampling options say.

    Args:
        key_id: key id of the application; ``plaintext`` for a baseline.
        vocab_size, context_length, eos_ids: as of a model.
        delay_s: pause before each token.
        concurrent: sequences computed at once; further ones wait.
    """

    def __init__(
        self,
        key_id: str,
        *,
        vocab_size: int = 1000,
        context_length: int = 4096,
        eos_ids: frozenset[int] = frozenset(),
        delay_s: float = 0,
        concurrent: int = 16,
    ) -> None:
        self.key_id = key_id
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.eos_ids = eos_ids
        self._delay_s = delay_s
        self._places = asyncio.Semaphore(concurrent)
        self._running = 0
        self._waiting = 0
        self._closed = False

    async def submit(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Token, None]:
        """Generate one sequence; closing the generator gives its place back."""
        stops = sampling.stop_ids | (frozenset() if sampling.ignore_eos else self.eos_ids)
        await self._enter()
        began = time.perf_counter()
        try:
            for produced, token in enumerate(chain(self.key_id, prompt, self.vocab_size), start=1):
                await asyncio.sleep(self._delay_s)
                finish = finish_reason(token, produced, stops, sampling.max_tokens)
                logprobs = fake_logprobs(token, sampling.logprobs, self.vocab_size)
                yield Token(token, *logprobs, finish, began if produced == 1 else None)
                if finish is not None:
                    return
        finally:
            self._running -= 1
            self._places.release()

    async def _enter(self) -> None:
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._waiting -= 1
        self._running += 1

    def healthy(self) -> bool:
        return not self._closed

    def load(self) -> Load:
        return Load(self._running, self._waiting)

    def close(self) -> None:
        self._closed = True


def fake_logprobs(
    token: int, wanted: int | None, vocab_size: int
) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """Log-probabilities of the right form, for whoever wants some."""
    if wanted is None:
        return None, ()
    count = min(wanted, vocab_size)
    return -0.5, tuple(((token + i) % vocab_size, -0.5 - i) for i in range(count))
