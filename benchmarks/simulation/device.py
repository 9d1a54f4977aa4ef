"""A device that computes in rounds: each busy replica takes one step per round, as slots take turns.

Every sequence gets one token per round, so a round is the device's own time: a sequence of ``n``
tokens ends ``n`` rounds after it began, however long the rounds are meanwhile. A round lasts the
sum of the busy replicas' steps, each by the size of its batch, and of one piece of a prompt for
each replica that reads one. Changes of the round's length need no change of anything scheduled.
"""

from __future__ import annotations

import heapq
from collections.abc import Generator
from itertools import count
from typing import Any

import simpy
from benchmarks.simulation.service import Service

Wait = Generator[simpy.Event, Any, None]
# Tokens of a prompt that are computed in one step.
PIECE = 2048


class Replica:
    """One tenant's weights on a device: at most ``max_concurrent`` sequences, one prompt at a time."""

    def __init__(self, env: simpy.Environment, device: Computer, service: Service) -> None:
        self.device = device
        self._service = service
        self._places = simpy.Resource(env, service.max_concurrent)
        self._prompts = simpy.Resource(env, 1)
        self._piece_s = PIECE * service.prefill_s
        self._running = 0
        self._reading = False

    def step_s(self) -> float:
        """What this replica adds to a round now."""
        return self._service.step_s[self._running] + (self._piece_s if self._reading else 0.0)

    def answer(self, prompt: float, output: float, first: simpy.Event | None = None) -> Wait:
        """Compute one request: wait for a place, read the prompt, decode.

        ``prompt`` and ``output`` are tokens; ``first`` succeeds when the prompt is read, which is when
        the first token is there.
        """
        with self._places.request() as place:
            yield place
            if prompt:
                yield from self._read(prompt)
            if first is not None:
                first.succeed()
            if output:
                yield from self._decode(output)

    def _read(self, prompt: float) -> Wait:
        with self._prompts.request() as turn:
            yield turn
            with self.device.change(self):
                self._reading = True
            yield self.device.after(prompt / PIECE)
            with self.device.change(self):
                self._reading = False

    def _decode(self, output: float) -> Wait:
        with self.device.change(self):
            self._running += 1
        yield self.device.after(output)
        with self.device.change(self):
            self._running -= 1


class Computer:
    """The rounds of one device.

    Attributes:
        busy_s: seconds in which it computed anything.
    """

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env
        self._rounds = 0.0
        self._round_s = 0.0
        self._at = env.now
        self._ends: list[tuple[float, int, simpy.Event]] = []
        self._number = count()
        self._generation = 0
        self._busy = 0
        self.busy_s = 0.0

    def change(self, replica: Replica) -> _Change:
        """A block in which the replica's share of a round changes."""
        return _Change(self, replica)

    def after(self, rounds: float) -> simpy.Event:
        """An event so many rounds from now."""
        self._advance()
        end = self._env.event()
        heapq.heappush(self._ends, (self._rounds + rounds, next(self._number), end))
        self._schedule()
        return end

    def replace(self, before: float, after: float) -> None:
        """From now on a replica adds ``after`` seconds to a round instead of ``before``."""
        self._advance()
        self._busy += (after > 0) - (before > 0)
        # Exactly nothing where nobody is busy: what rounding leaves would be a very fast device.
        self._round_s = self._round_s + after - before if self._busy else 0.0
        self._schedule()

    def _advance(self) -> None:
        passed = self._env.now - self._at
        self._at = self._env.now
        if self._round_s > 0:
            self._rounds += passed / self._round_s
            self.busy_s += passed

    def _schedule(self) -> None:
        """Wake up at the next end; a wake-up that an earlier change has overtaken does nothing."""
        self._generation += 1
        if self._ends:
            left = max(0.0, (self._ends[0][0] - self._rounds) * self._round_s)
            wake = self._env.timeout(left, self._generation)
            wake.callbacks.append(self._wake)

    def _wake(self, event: simpy.Event) -> None:
        if event.value != self._generation:
            return
        self._advance()
        end, _, done = heapq.heappop(self._ends)
        # What was waited for is reached exactly, whatever rounding makes of the division.
        self._rounds = end
        done.succeed()
        self._schedule()


class _Change:
    def __init__(self, device: Computer, replica: Replica) -> None:
        self._device, self._replica = device, replica

    def __enter__(self) -> None:
        self._before = self._replica.step_s()

    def __exit__(self, *_: object) -> None:
        self._device.replace(self._before, self._replica.step_s())
