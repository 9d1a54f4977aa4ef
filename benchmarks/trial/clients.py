"""Clients of a trial: SDK clients that stream, check every answer, and note what each request met."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import httpx
import numpy as np

from anamorph.client import AsyncClient, TokenCodec
from anamorph.client.session import Send, Step
from anamorph.errors import KeyMismatch, ServiceError, StreamInterrupted, TooManyRequests, Unavailable
from anamorph.serve.engines.fake import continuation
from anamorph.wire.problems import status_of

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
        detail: of whatever is not right, the cause: class, status and text of an error, where a request
            hung, what was wrong with an answer.
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


class NotingClient(AsyncClient):
    """Keeps the codec of every key under which it has sent, so that each answer can be judged."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.codecs: dict[str, TokenCodec] = {}

    async def _perform(self, step: Step, stream: bool) -> Any:
        if isinstance(step, Send):
            self.codecs[step.lease.key_id] = step.lease.codec
        return await super()._perform(step, stream)


class Caller:
    """One client of a tenant, with its own key cache.

    Args:
        deadline_s: after it a request counts as hung. By default what SDK and policy allow together: 30 s of
            repeating, then a last try with 5 s to connect, 10 s to the first byte and 20 s of request;
            and 5 s for a busy machine.
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
        deadline_s: float = 70,
        retry_for: float = 30,
        read_s: float = 10,
    ) -> None:
        timeout = httpx.Timeout(connect=5, read=read_s, write=10, pool=30)
        self._client = NotingClient(keysvc_url, api_key, tenant, model, retry_for=retry_for, timeout=timeout)
        self._tenant = tenant
        self._expected = expected
        self._deadline_s = deadline_s

    async def close(self) -> None:
        """Forget key and connections."""
        await self._client.close()

    async def ask(self, question: Question, intended: float) -> Met:
        """Send one request now, and say how it ended; raises nothing but cancellation."""
        answer = Answer()
        try:
            async with asyncio.timeout(self._deadline_s):
                await self._stream(question, answer)
                outcome, detail = self._judge(question, answer)
        except TimeoutError as error:
            hung = f"no end within {self._deadline_s:g} s, waited {waited_in(error)}"
            outcome, detail = Outcome.HUNG, hung
        except Exception as error:  # noqa: BLE001 - whatever it is, it is noted
            outcome, detail = verdict(error), told(error)
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
        chunks = self._client.stream(list(question.prompt), max_tokens=question.tokens, temperature=0)
        async with aclosing(chunks):
            async for chunk in chunks:
                answer.first = answer.first or time.monotonic()
                answer.key_id = chunk.system_fingerprint
                for choice in chunk.choices:
                    answer.ids += choice.token_ids

    def _judge(self, question: Question, answer: Answer) -> tuple[Outcome, str]:
        codec = self._client.codecs.get(answer.key_id)
        if codec is None:  # it is not called wrong unseen
            return Outcome.UNJUDGED, f"it names key {answer.key_id!r}, asked under {[*self._client.codecs]}"
        expected = list(self._expected(codec, question))
        if answer.ids == expected:
            return Outcome.RIGHT, ""
        same = next((n for n, (a, b) in enumerate(zip(answer.ids, expected, strict=False)) if a != b), None)
        where = f"the first other is number {same}" if same is not None else "those that came are right"
        return Outcome.WRONG, f"{len(answer.ids)} ids of {len(expected)}; {where}"


def told(error: Exception) -> str:
    """Class, HTTP status where there is one, and text of an error."""
    status = f" {status_of(error)}" if isinstance(error, ServiceError) else ""
    return f"{type(error).__name__}{status}: {error}"[:300]


def waited_in(error: TimeoutError) -> str:
    """Functions of the client in which the wait was that ``asyncio.timeout`` ended, the innermost last."""
    ended = error.__cause__ or error
    frames = traceback.extract_tb(ended.__traceback__)
    ours = [f"{frame.name}:{frame.lineno}" for frame in frames if "anamorph/client" in frame.filename]
    return f"in {' > '.join(ours[-4:])}" if ours else f"in {frames[-1].name}"


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


def failures(met: Sequence[Met]) -> list[dict[str, Any]]:
    """Every request that did not end in the right answer, with its cause, in order of time."""
    start = min((one.intended for one in met), default=0.0)
    return [
        {
            "at_s": round(one.intended - start, 1),
            "tenant": one.tenant,
            "outcome": one.outcome.value,
            "detail": one.detail,
            "seconds": round(one.seconds, 2),
            "first_s": None if one.first_s is None else round(one.first_s, 2),
            "tokens": one.tokens,
            "key_id": one.key_id,
        }
        for one in sorted(met, key=lambda one: one.intended)
        if one.outcome is not Outcome.RIGHT
    ]
