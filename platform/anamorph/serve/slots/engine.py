"""The engine of a pool: one task that swaps, admits and steps as the scheduler says.

All decisions are made on the event loop, so there is nothing to lock. Steps run on one
thread, one at a time; copies run on another, beside them. A slot is with one of the two
at most. The task lives while there are sequences.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from anamorph.errors import Gone, ServiceError, Unavailable
from anamorph.serve.engines.base import Load as EngineLoad
from anamorph.serve.engines.base import Sampling, Token
from anamorph.serve.slots.base import Backend, Delivery, Job, Opened
from anamorph.serve.slots.fairness import Limits
from anamorph.serve.slots.metrics import PoolMetrics
from anamorph.serve.slots.scheduler import Load, Scheduler

# A busy slot is taken only from who is ahead by this many swaps: so swapping costs a fifth of its time.
TURN_SWAPS = 4
# Whatever a swap takes, for example from a cold disk, nobody waits longer than this for its turn to begin.
LONGEST_TURN_S = 2.0
# What one step is charged at most: a process that was stopped for a minute owes nobody a minute.
LONGEST_CHARGE_S = 5.0

_log = logging.getLogger("anamorph.serve.slots")


@dataclass
class _Held:
    """A sequence inside, from its arrival until its caller has left."""

    job: Job
    outputs: asyncio.Queue[Token | Exception] = field(default_factory=asyncio.Queue)
    slot: int | None = None
    tokens: int = 0


class SlotEngine:
    """Computes the sequences of all members of a pool.

    Args:
        backend: where weights and caches are.
        scheduler: what happens next.
        metrics: of the pool.
        stall_s: a step that takes longer means that the engine hangs.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        backend: Backend,
        scheduler: Scheduler,
        metrics: PoolMetrics,
        *,
        stall_s: float = 120,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backend = backend
        self._scheduler = scheduler
        self._metrics = metrics
        self._stall_s = stall_s
        self._clock = clock
        self._numbers = itertools.count()
        self._held: dict[int, _Held] = {}
        self._changed = asyncio.Event()
        self._driver: asyncio.Task[None] | None = None
        self._swaps: set[asyncio.Task[None]] = set()
        self._stepping_since: float | None = None
        self._failed = False
        self._steps = ThreadPoolExecutor(1, "anamorph-steps")
        self._copies = ThreadPoolExecutor(1, "anamorph-copies")

    def put(self, key_id: str, limits: Limits) -> None:
        """Add a member whose replica is open, or change its limits."""
        self._scheduler.put(key_id, limits, self._clock())
        self._changed.set()

    async def remove(self, key_id: str, error: ServiceError) -> None:
        """End a member: its sequences end in ``error`` at once, then its host memory is freed."""
        self.end(key_id, error)
        self._scheduler.remove(key_id)
        # After a copy that may be under way.
        await asyncio.get_running_loop().run_in_executor(self._copies, self._backend.forget, key_id)

    def end(self, key_id: str, error: ServiceError, *, running: bool = True) -> None:
        """End a member's sequences in ``error``; without ``running`` only those that have not begun."""
        for number, held in list(self._held.items()):
            if held.job.key_id == key_id and (running or held.slot is None):
                self._end(number, error)

    async def submit(
        self, key_id: str, opened: Opened, prompt: Sequence[int], sampling: Sampling
    ) -> AsyncGenerator[Token, None]:
        """Generate one sequence of a member; closing the generator cancels it.

        Raises:
            Unavailable: the engine failed, before or while it answered.
            ServiceError: what the member was ended with.
        """
        if self._failed:
            raise _stopped()
        stops = sampling.stop_ids | (frozenset() if sampling.ignore_eos else opened.eos_ids)
        held = _Held(Job(next(self._numbers), key_id, tuple(prompt), sampling, stops))
        self._enter(held)
        try:
            while True:
                item = await held.outputs.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.finish is not None:
                    return
        finally:
            self._leave(held.job.number)

    def _enter(self, held: _Held) -> None:
        job = held.job
        if not self._scheduler.knows(job.key_id):  # it left while the request was being read
            raise Gone("this key version is no longer served; ask for the current one", code="key_gone")
        self._metrics.requested(hit=self._scheduler.resident(job.key_id))
        self._scheduler.enqueue(job.number, job.key_id, len(job.prompt) + job.sampling.max_tokens)
        self._held[job.number] = held
        self._changed.set()
        if self._driver is None or self._driver.done():
            self._driver = asyncio.get_running_loop().create_task(self._drive())

    def load(self, key_id: str) -> EngineLoad:
        """Sequences of one member, computed and waiting."""
        mine = [held.slot for held in self._held.values() if held.job.key_id == key_id]
        return EngineLoad(sum(slot is not None for slot in mine), sum(slot is None for slot in mine))

    def rate_wait(self, key_id: str) -> float:
        """Seconds for which a member's rate limit lets nothing begin."""
        return self._scheduler.wait(key_id, self._clock())

    def healthy(self) -> bool:
        """No step failed, and none hangs."""
        since = self._stepping_since
        return not self._failed and (since is None or self._clock() - since < self._stall_s)

    async def close(self) -> None:
        """End all sequences and both threads, within a step."""
        self._fail()
        for task in [*self._swaps, *([self._driver] if self._driver else [])]:
            task.cancel()
        await asyncio.to_thread(self._steps.shutdown)
        await asyncio.to_thread(self._copies.shutdown)
        self._backend.close()

    async def _drive(self) -> None:
        try:
            while self._held:
                await self._turn()
        except Exception as error:  # noqa: BLE001 - whatever it was, this engine computes no more
            # The type alone: a message could quote a request.
            _log.critical("the engine stops: %s", type(error).__name__)
            self._fail()

    async def _turn(self) -> None:
        self._changed.clear()
        now = self._clock()
        for load in self._scheduler.loads(now):
            task = asyncio.create_task(self._swap(load))
            self._swaps.add(task)
            task.add_done_callback(self._swaps.discard)
        for begin in self._scheduler.begins(now):
            held = self._held[begin.number]
            held.slot = begin.slot
            self._backend.slot(begin.slot).add(held.job)
        slot = self._scheduler.next_step()
        if slot is not None:
            await self._step(slot)
        else:
            await self._pause(self._scheduler.next_change(now))

    async def _pause(self, seconds: float | None) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            pass

    async def _step(self, index: int) -> None:
        step = self._backend.slot(index).step
        self._stepping_since = began = self._clock()
        try:
            deliveries = await asyncio.get_running_loop().run_in_executor(self._steps, step)
        finally:
            self._stepping_since = None
        self._scheduler.stepped(index, min(self._clock() - began, LONGEST_CHARGE_S))
        for delivery in deliveries:
            self._deliver(delivery)

    def _deliver(self, delivery: Delivery) -> None:
        held = self._held.get(delivery.number)
        if held is None:  # cancelled while the step was computed
            return
        for token in delivery.tokens:
            held.tokens += 1
            held.outputs.put_nowait(token)
        if delivery.error is not None:
            self._end(delivery.number, delivery.error)
        elif delivery.tokens and delivery.tokens[-1].finish is not None:
            # Its place is free from now on, whenever the caller takes the last token.
            self._leave(delivery.number)

    async def _swap(self, load: Load) -> None:
        slot, began = self._backend.slot(load.slot), self._clock()
        try:
            copied = await asyncio.get_running_loop().run_in_executor(self._copies, slot.load, load.key_id)
        except Exception as error:  # noqa: BLE001 - this member's replica; the others go on
            _log.error("%s cannot be loaded: %s", load.key_id, type(error).__name__)
            self._scheduler.loaded(load, good=False)
            self.end(load.key_id, _unavailable("the replica cannot be loaded"))
        else:
            took = self._clock() - began
            self._scheduler.quantum = min(LONGEST_TURN_S, (self._scheduler.quantum + TURN_SWAPS * took) / 2)
            self._metrics.swapped(took, copied)
            self._scheduler.loaded(load)
        self._changed.set()

    def _leave(self, number: int) -> None:
        held = self._held.pop(number, None)
        if held is None:
            return
        self._scheduler.leave(number, len(held.job.prompt) + held.tokens if held.slot is not None else 0)
        if held.slot is not None:
            self._backend.slot(held.slot).cancel(number)
        self._changed.set()

    def _end(self, number: int, error: ServiceError) -> None:
        held = self._held[number]
        self._leave(number)
        held.outputs.put_nowait(error)

    def _fail(self) -> None:
        self._failed = True
        for number in list(self._held):
            self._end(number, _stopped())


def _stopped() -> Unavailable:
    return _unavailable("the engine has stopped")


def _unavailable(message: str) -> Unavailable:
    return Unavailable(message, code="unavailable", retry_after=5)
