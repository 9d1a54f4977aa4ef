"""Clients of a trial: SDK clients that stream, check every answer, and note what each request met."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import httpx
import numpy as np

from anamorph.client import AsyncClient, TokenCodec
from anamorph.errors import KeyMismatch, StreamInterrupted, TooManyRequests, Unavailable
from anamorph.serve.engines.fake import continuation

# What docs/client.md promises that a request may end in while something is broken.
DOCUMENTED = (StreamInterrupted, TooManyRequests, Unavailable)


class Outcome(StrEnum):
    """What became of a request."""

    RIGHT = "right"
    WRONG = "wrong answer"
    REFUSED = "documented error"
    STRANGE = "undocumented error"
    HUNG = "past its deadline"
    UNJUDGED = "under a key that its client has left"


@dataclass(frozen=True)
class Question:
    """A prompt of plain ids, and how many ids are wanted."""

    prompt: tuple[int, ...]
    tokens: int


class Expected(Protocol):
    """The right answer, in plain ids, under a key."""

    def __call__(self, codec: TokenCodec, question: Question) -> Sequence[int]: ...


def fake_answer(vocab_size: int) -> Expected:
    """What the fake engine must answer."""

    def expected(codec: TokenCodec, question: Question) -> Sequence[int]:
        encrypted = codec.encrypt(question.prompt)
        return list(codec.decrypt(continuation(codec.key_id, encrypted, question.tokens, vocab_size)))

    return expected


@dataclass(frozen=True)
class Met:
    """One request.

    Args:
        intended: when it was to start, seconds on the monotonic clock; all durations count from it.
        first_s, seconds: until the first token, and until the end.
        detail: of an error, its class and text.
    """

    tenant: str
    intended: float
    seconds: float
    outcome: Outcome
    first_s: float | None = None
    tokens: int = 0
    key_id: str = ""
    detail: str = ""

    @property
    def per_token_s(self) -> float | None:
        """Seconds per token after the first."""
        if self.first_s is None or self.tokens < 2:
            return None
        return (self.seconds - self.first_s) / (self.tokens - 1)


@dataclass
class Answer:
    """What has come of an answer so far."""

    ids: list[int] = field(default_factory=list)
    first: float | None = None
    key_id: str = ""


class Caller:
    """One client of a tenant, with its own key cache.

    Args:
        deadline_s: after it a request counts as hung; above everything the SDK itself allows.
        retry_for, read_s: of the SDK's client: how long it repeats, how long it waits for bytes.
    """

    def __init__(
        self,
        keysvc_url: str,
        api_key: str,
        tenant: str,
        model: str,
        expected: Expected,
        *,
        deadline_s: float = 90,
        retry_for: float = 30,
        read_s: float = 10,
    ) -> None:
        timeout = httpx.Timeout(connect=5, read=read_s, write=10, pool=30)
        self._client = AsyncClient(keysvc_url, api_key, tenant, model, retry_for=retry_for, timeout=timeout)
        self._tenant = tenant
        self._expected = expected
        self._deadline_s = deadline_s
        self._codecs: dict[str, TokenCodec] = {}

    async def close(self) -> None:
        """Forget key and connections."""
        await self._client.close()

    async def ask(self, question: Question, intended: float) -> Met:
        """Send one request now, and say how it ended; raises nothing but cancellation."""
        answer = Answer()
        try:
            async with asyncio.timeout(self._deadline_s):
                await self._stream(question, answer)
                outcome, detail = await self._judge(question, answer), ""
        except TimeoutError:
            outcome, detail = Outcome.HUNG, f"no end within {self._deadline_s:.0f} s"
        except Exception as error:  # noqa: BLE001 - whatever it is, it is noted
            outcome, detail = verdict(error), f"{type(error).__name__}: {error}"[:300]
        first = None if answer.first is None else answer.first - intended
        return Met(
            self._tenant,
            intended,
            time.monotonic() - intended,
            outcome,
            first,
            len(answer.ids),
            answer.key_id,
            detail,
        )

    async def _stream(self, question: Question, answer: Answer) -> None:
        with suppress(Unavailable, TooManyRequests):  # the request itself says so, if it lasts
            await self._note_codec()
        chunks = self._client.stream(list(question.prompt), max_tokens=question.tokens, temperature=0)
        async with aclosing(chunks):
            async for chunk in chunks:
                answer.first = answer.first or time.monotonic()
                answer.key_id = chunk.system_fingerprint
                if answer.key_id not in self._codecs:  # the client has moved meanwhile
                    await self._note_codec()
                for choice in chunk.choices:
                    answer.ids += choice.token_ids

    async def _judge(self, question: Question, answer: Answer) -> Outcome:
        codec = self._codecs.get(answer.key_id)
        if codec is None:  # a rotation overtook the answer: it is not called wrong unseen
            return Outcome.UNJUDGED
        return Outcome.RIGHT if answer.ids == list(self._expected(codec, question)) else Outcome.WRONG

    async def _note_codec(self) -> None:
        lease = await self._client.lease()
        self._codecs[lease.key_id] = lease.codec


def verdict(error: Exception) -> Outcome:
    """How an error counts."""
    if isinstance(error, KeyMismatch):
        return Outcome.WRONG
    return Outcome.REFUSED if isinstance(error, DOCUMENTED) else Outcome.STRANGE


async def arrivals(
    callers: Sequence[Caller],
    questions: Callable[[np.random.Generator], Question],
    per_s: float,
    stop: asyncio.Event,
    seed: int,
    met: list[Met],
) -> None:
    """Start requests at random times (Poisson), whatever became of those before; return when all ended."""
    source, running = np.random.default_rng(seed), set[asyncio.Task[None]]()
    due = time.monotonic()

    async def one(caller: Caller, question: Question, intended: float) -> None:
        met.append(await caller.ask(question, intended))

    while not stop.is_set():
        due += source.exponential(1 / per_s)
        caller, question = callers[int(source.integers(len(callers)))], questions(source)
        try:
            await asyncio.wait_for(stop.wait(), max(0.0, due - time.monotonic()))
        except TimeoutError:
            task = asyncio.create_task(one(caller, question, due))
            running.add(task)
            task.add_done_callback(running.discard)
    await asyncio.gather(*running)


def random_question(
    vocab_size: int, prompt: tuple[int, int], tokens: tuple[int, int]
) -> Callable[[np.random.Generator], Question]:
    """Questions of random ids, lengths between the bounds, all equally likely."""

    def draw(source: np.random.Generator) -> Question:
        ids = source.integers(0, vocab_size, source.integers(*prompt, endpoint=True))
        return Question(tuple(ids.tolist()), int(source.integers(*tokens, endpoint=True)))

    return draw


def tally(met: Sequence[Met]) -> dict[str, int]:
    """How many ended how; every outcome is named."""
    counted = Counter(one.outcome for one in met)
    return {outcome.value: counted[outcome] for outcome in Outcome}


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 90th and 99th percentile and mean in milliseconds, as ``vllm bench serve`` names them."""
    if not seconds:
        return {}
    values = 1e3 * np.asarray(seconds)
    shown = {f"p{share}": float(np.percentile(values, share)) for share in (50, 90, 99)}
    return {"mean": float(values.mean()), **shown}


def latencies(met: Sequence[Met]) -> dict[str, dict[str, float]]:
    """TTFT, TPOT and E2EL of right answers."""
    right = [one for one in met if one.outcome is Outcome.RIGHT]
    return {
        "ttft_ms": quantiles([one.first_s for one in right if one.first_s is not None]),
        "tpot_ms": quantiles([one.per_token_s for one in right if one.per_token_s is not None]),
        "e2el_ms": quantiles([one.seconds for one in right]),
    }


def errors_met(met: Sequence[Met]) -> dict[str, int]:
    """Error texts, the most frequent first."""
    return dict(Counter(one.detail for one in met if one.detail).most_common(20))
