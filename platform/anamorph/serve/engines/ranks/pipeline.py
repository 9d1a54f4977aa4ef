"""The engine of rank 0 of a pipeline: sequences take turns, one token each."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from anamorph.errors import Unavailable
from anamorph.serve.engines.base import Load, Sampling, Token, finish_reason
from anamorph.serve.engines.ranks.stage import COMPUTE, FORGET, STOP, WAIT, Stage
from anamorph.serve.engines.sampler import Drawn, Row, choose
from anamorph.serve.engines.torch import PAGE, Capacity, ids_of, refuse_decoding_rules

_log = logging.getLogger("anamorph.serve")
# How often the ranks hear of each other while there is nothing to compute.
IDLE_S = 0.1
# How often a request looks whether the engine still lives.
LOOK_S = 1.0


@dataclass(eq=False)
class _Sequence:
    """One sequence; the computing thread reads and writes it, except for ``cancelled``."""

    number: int
    rest: list[int]  # ids not computed yet: of the prompt, then the last token
    drawn: Drawn
    stops: frozenset[int]
    deliver: Callable[[Token], None]
    produced: int = 0
    begun: bool = False
    cancelled: bool = False
    room: int = field(init=False)  # tokens that its cache may come to hold

    def __post_init__(self) -> None:
        self.room = len(self.rest) + self.drawn.sampling.max_tokens


class PipelineEngine:
    """One pipeline and the thread that drives it.

    Args:
        model: rank 0's part of the model.
        capacity: ``max_concurrent`` sequences take turns while their prompts and answers fit into
            ``num_blocks`` pages; ``max_batch_tokens`` bounds a step of a long prompt.
        alive: whether the other ranks live.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        model: Any,
        capacity: Capacity,
        alive: Callable[[], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        refuse_decoding_rules(model)
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self._room = capacity.num_blocks * PAGE
        self.context_length = min(capacity.context_length, self._room)
        self.eos_ids = ids_of(model.generation_config.eos_token_id)
        self._capacity = capacity
        self._alive = alive
        self._clock = clock
        self._last_step = clock()
        self._numbers = itertools.count()
        self._wake = threading.Event()
        self._stopping = False
        self._failed = False
        self._arrived: deque[_Sequence] = deque()
        self._turns: deque[_Sequence] = deque()
        self._inside = 0
        self._stage = Stage(model, capacity.collective_s)
        self._thread = threading.Thread(target=self._run, name="pipeline", daemon=True)
        self._thread.start()

    async def submit(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Token, None]:
        """Generate one sequence; closing the generator cancels it."""
        outputs: asyncio.Queue[Token] = asyncio.Queue()
        sequence = self._enqueue(prompt, sampling, asyncio.get_running_loop(), outputs)
        try:
            finish = None
            while finish is None:
                token = await self._next(outputs)
                if sequence.drawn.broken:
                    raise Unavailable("the model computed no finite logits", code="unavailable")
                finish = token.finish
                yield token
        finally:
            sequence.cancelled = True
            self._inside -= 1

    def _enqueue(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        loop: asyncio.AbstractEventLoop,
        outputs: asyncio.Queue[Token],
    ) -> _Sequence:
        if not self._computing():
            raise Unavailable("the engine has stopped", code="unavailable", retry_after=5)
        if self._inside == 0:  # an idle engine makes no steps: count from now
            self._last_step = self._clock()
        stops = sampling.stop_ids | (frozenset() if sampling.ignore_eos else self.eos_ids)
        drawn = Drawn(sampling, len(prompt))

        def deliver(token: Token) -> None:
            with suppress(RuntimeError):  # a loop that is closed has nobody left who waits
                loop.call_soon_threadsafe(outputs.put_nowait, token)

        sequence = _Sequence(next(self._numbers), list(prompt), drawn, stops, deliver)
        self._inside += 1
        self._arrived.append(sequence)
        self._wake.set()
        return sequence

    async def _next(self, outputs: asyncio.Queue[Token]) -> Token:
        while True:
            try:
                async with asyncio.timeout(LOOK_S):
                    return await outputs.get()
            except TimeoutError:
                if not self._computing():
                    raise Unavailable("the engine failed", code="unavailable", retry_after=5) from None

    def _computing(self) -> bool:
        return self._thread.is_alive() and not self._failed and not self._stopping and self._alive()

    def healthy(self) -> bool:
        """The thread lives, no collective failed, nothing hangs, and no rank is lost."""
        stalled = self._inside > 0 and self._clock() - self._last_step > self._capacity.stall_s
        return self._computing() and not stalled

    def load(self) -> Load:
        """Sequences inside; those that do not take turns yet are waiting."""
        running = min(len(self._turns), self._inside)
        return Load(running, self._inside - running)

    def close(self) -> None:
        """Stop the thread within a step, and with it the other ranks."""
        self._stopping = True
        self._wake.set()
        self._thread.join(30)

    # Everything below runs on the computing thread.

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._admit()
                if self._turns:
                    self._turn(self._turns.popleft())
                else:
                    self._stage.say(WAIT)
                    self._wake.wait(IDLE_S)
                    self._wake.clear()
            self._stage.say(STOP)
        except Exception as error:  # noqa: BLE001 - its text may quote a request; health says that it was
            _log.error("the pipeline has stopped: %s", type(error).__name__)
            self._failed = True

    def _admit(self) -> None:
        while self._arrived and len(self._turns) < self._capacity.max_concurrent:
            taken = sum(sequence.room for sequence in self._turns)
            if taken + self._arrived[0].room > self._room:
                return
            self._turns.append(self._arrived.popleft())

    def _turn(self, sequence: _Sequence) -> None:
        """Compute one step of a sequence; it gets another turn unless it is finished."""
        if sequence.cancelled or self._step(sequence):
            self._stage.say(FORGET, sequence.number)
        else:
            self._turns.append(sequence)

    def _step(self, sequence: _Sequence) -> bool:
        if not sequence.begun:
            sequence.begun, sequence.drawn.began = True, time.perf_counter()
        ids = sequence.rest[: self._capacity.max_batch_tokens]
        sequence.rest = sequence.rest[len(ids) :]
        logits = self._stage.say(COMPUTE, sequence.number, ids)
        self._last_step = self._clock()
        if sequence.rest or logits is None:  # the prompt goes on
            return False
        token = self._chosen(sequence, logits)
        sequence.deliver(token)
        sequence.rest = [token.id]
        return token.finish is not None or sequence.drawn.broken

    def _chosen(self, sequence: _Sequence, logits: torch.Tensor) -> Token:
        drawn = sequence.drawn
        chosen = int(choose(logits[None], [Row(drawn, sequence.produced)])[0])
        sequence.produced += 1
        logprob, top = drawn.logprobs.popleft() if drawn.logprobs else (None, ())
        finish = finish_reason(chosen, sequence.produced, sequence.stops, drawn.sampling.max_tokens)
        return Token(chosen, logprob, top, finish, drawn.began if sequence.produced == 1 else None)
