"""Slots without a model: what they answer is ``fake.continuation`` of the key they hold.

A swap, a step and each token of a step take the time they are told, so that fairness can
be measured on any machine, and an answer under a wrong key shows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import parse_qsl

from anamorph.errors import MixedKeys
from anamorph.replica import Held
from anamorph.serve.engines import folder as configuration
from anamorph.serve.engines.base import Token, finish_reason
from anamorph.serve.engines.fake import chain, fake_logprobs
from anamorph.serve.slots.base import Delivery, Job, Opened
from anamorph.wire.serving import PoolMember, PoolSettings

FAKE = "fake:"


@dataclass(frozen=True)
class FakeReplica:
    """What a fake slot loads: ids are below ``vocab_size``.

    Args:
        swap_s: seconds to load it.
        step_s: seconds of a step, whatever is in it.
        token_s: seconds of each token in a step, besides.
    """

    vocab_size: int = 1000
    swap_s: float = 0.0
    step_s: float = 0.0
    token_s: float = 0.0

    @classmethod
    def parse(cls, replica: str) -> FakeReplica:
        """From ``fake:?vocab_size=…&swap_ms=…&delay_ms=…&token_ms=…``."""
        options = dict(parse_qsl(replica.removeprefix(FAKE).lstrip("?")))
        times = (float(options.get(name, 0)) / 1000 for name in ("swap_ms", "delay_ms", "token_ms"))
        return cls(int(options.get("vocab_size", 1000)), *times)


class FakeBackend:
    """Fake slots; members name ``fake:?vocab_size=…`` or a replica, which is verified.

    Args:
        settings: of the pool.
        hold: verifies a member's replica.
        sleep: seconds.
    """

    def __init__(
        self,
        settings: PoolSettings,
        hold: Callable[[PoolMember], Held],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._settings = settings
        self._hold = hold
        self._replicas: dict[str, FakeReplica] = {}
        self._slots = [FakeSlot(self._replicas, sleep) for _ in range(settings.slots)]

    def open(self, member: PoolMember) -> Opened:
        """Verify a member's replica, if it has one."""
        replica = self._replicas[member.key_id] = self._replica(member)
        return Opened(replica.vocab_size, self._settings.context_length, frozenset())

    def _replica(self, member: PoolMember) -> FakeReplica:
        if member.replica.startswith(FAKE):
            return FakeReplica.parse(member.replica)
        with self._hold(member) as held:
            return FakeReplica(int(configuration.read(held.folder, configuration.CONFIG)["vocab_size"]))

    def slot(self, index: int) -> FakeSlot:
        """One of them."""
        return self._slots[index]

    def forget(self, key_id: str) -> None:
        """Forget a member."""
        self._replicas.pop(key_id, None)

    def resident_bytes(self) -> int:
        """None: there are no weights."""
        return 0

    def close(self) -> None:
        """Nothing to free."""


@dataclass
class _Inside:
    job: Job
    computed: int  # tokens of the next step: the prompt at first, then one
    produced: int = 0
    ids: Iterator[int] | None = None


class FakeSlot:
    """A slot that knows the key of its weights."""

    def __init__(self, replicas: dict[str, FakeReplica], sleep: Callable[[float], None]) -> None:
        self.key_id: str | None = None
        self._replicas = replicas
        self._replica = FakeReplica()
        self._sleep = sleep
        self._inside: dict[int, _Inside] = {}

    def load(self, key_id: str) -> int:
        """Take over another key."""
        self.key_id = None
        self._inside.clear()
        self._replica = self._replicas[key_id]
        self._sleep(self._replica.swap_s)
        self.key_id = key_id
        return 0

    def add(self, job: Job) -> None:
        """Take a sequence."""
        if job.key_id != self.key_id:
            raise MixedKeys("a sequence was given to a slot with another key")
        self._inside[job.number] = _Inside(job, len(job.prompt))

    def cancel(self, number: int) -> None:
        """Drop a sequence."""
        self._inside.pop(number, None)

    def step(self) -> list[Delivery]:
        """One token for every sequence inside."""
        batch = list(self._inside.values())
        if self.key_id is None or any(inside.job.key_id != self.key_id for inside in batch):
            raise MixedKeys("a step held a request of another key than the slot's weights")
        tokens = sum(inside.computed for inside in batch)
        self._sleep(self._replica.step_s + self._replica.token_s * tokens)
        return [self._next(inside, self.key_id) for inside in batch]

    def _next(self, inside: _Inside, key_id: str) -> Delivery:
        job, vocab_size = inside.job, self._replica.vocab_size
        if inside.ids is None:
            # By the key of the weights, as a model would: not by the one that the sequence names.
            inside.ids = chain(key_id, job.prompt, vocab_size)
        inside.produced += 1
        inside.computed = 1
        token = next(inside.ids)
        finish = finish_reason(token, inside.produced, job.stops, job.sampling.max_tokens)
        if finish is not None:
            self.cancel(job.number)
        logprobs = fake_logprobs(token, job.sampling.logprobs, vocab_size)
        return Delivery(job.number, (Token(token, *logprobs, finish),))
