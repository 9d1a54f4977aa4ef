"""Which replica is in which slot, who may begin, and whose step is next: a pure state machine.

It knows neither weights nor requests, only names, numbers and the time it is told. Two
orders, both weighted by ``Limits.weight``:

- *Steps* of the slots that have something to compute take turns by start-time fair
  queueing (Goyal, Vin and Cheng, SIGCOMM 1996): the lowest start tag first; a step moves
  its member's tag on by cost / weight; who begins anew starts at the tag in service, so
  nobody saves up time or is punished for having had an idle engine.
- *Slots* go to the waiting member with the least service, and are taken from an idle
  member, the least recently used, else from the busy one with the most. That one is let
  finish what runs and begins nothing new. It must be ahead by ``quantum``, so that
  swapping stays a small part of the time.

Cost is the engine's time in seconds, not a number of tokens: a step with one sequence
takes nearly as long as a step with sixteen, and counting tokens would give most of the
engine to whoever fills his steps badly.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from anamorph.serve.slots.fairness import Bucket, Limits


@dataclass(frozen=True)
class Load:
    """Copy the replica of ``key_id`` into ``slot``; nothing in it is running."""

    slot: int
    key_id: str


@dataclass(frozen=True)
class Begin:
    """Give a sequence to its slot."""

    slot: int
    number: int


@dataclass
class _Member:
    key_id: str
    limits: Limits
    bucket: Bucket
    slot: _Slot | None = None
    start: float = 0.0  # start tag of its next step
    served: float = 0.0  # cost / weight so far
    queue: deque[int] = field(default_factory=deque)
    running: set[int] = field(default_factory=set)

    def may_begin(self, now: float) -> bool:
        """Whether its next sequence could be computed, were there a slot."""
        limit = self.limits.max_concurrent
        return bool(self.queue) and len(self.running) < limit and self.bucket.wait(now) <= 0


@dataclass
class _Slot:
    index: int
    member: _Member | None = None
    loading: bool = False
    draining: bool = False
    used: int = 0  # number of the step that used it last


class Scheduler:
    """The state of one pool.

    Args:
        slots: how many there are.
        places: sequences that one slot computes at a time.
        quantum: seconds of the engine that a busy member must be ahead, before its slot is taken.
    """

    def __init__(self, slots: int, places: int, quantum: float = 0.25) -> None:
        self.quantum = quantum
        self._places = places
        self._slots = [_Slot(index) for index in range(slots)]
        self._members: dict[str, _Member] = {}
        self._active: dict[str, _Member] = {}  # with a sequence, queued or running
        self._tokens: dict[int, tuple[_Member, int]] = {}  # sequence → whose, and at most how many ids
        self._virtual = 0.0  # start tag in service
        self._finished = 0.0  # highest finish tag there was
        self._floor = 0.0  # least service of those who want some
        self._steps = 0

    def put(self, key_id: str, limits: Limits, now: float) -> None:
        """Add a member, or give it other limits."""
        member = self._members.get(key_id)
        if member is None:
            self._members[key_id] = _Member(key_id, limits, Bucket(limits.tokens_per_s, now))
            return
        member.limits = limits
        member.bucket.change(limits.tokens_per_s, now)

    def remove(self, key_id: str) -> None:
        """Forget a member without sequences; its slot is free, once it is not being loaded."""
        member = self._members.pop(key_id)
        if member.slot is not None:
            member.slot.member = None

    def enqueue(self, number: int, key_id: str, tokens: int) -> None:
        """Add a sequence of at most ``tokens`` ids, prompt and answer, to its member's queue."""
        member = self._members[key_id]
        self._raise_floor()
        if key_id not in self._active:
            member.served = max(member.served, self._floor)
            self._active[key_id] = member
        member.queue.append(number)
        self._tokens[number] = member, tokens

    def leave(self, number: int, tokens: int) -> None:
        """A sequence ended, in whatever way, after ``tokens`` ids."""
        member, reserved = self._tokens.pop(number)
        if number in member.running:
            member.running.discard(number)
            member.bucket.give_back(max(0, reserved - tokens))
        else:
            member.queue.remove(number)
        if not member.queue and not member.running:
            self._raise_floor()
            del self._active[member.key_id]

    def loads(self, now: float) -> list[Load]:
        """Begin to swap, as far as slots are free, and mark those that are to become so.

        Each must be reported back by ``loaded``.
        """
        wanting = [m for m in self._active.values() if m.slot is None and m.may_begin(now)]
        wanting.sort(key=lambda m: (m.served, m.queue[0]))
        begun = []
        while wanting and (slot := self._idle(now)) is not None:
            begun.append(_assign(slot, wanting.pop(0)))
        self._drain(wanting)
        return begun

    def loaded(self, load: Load, *, good: bool = True) -> None:
        """A swap is through; ``good=False``: it failed, and the slot holds nothing."""
        slot = self._slots[load.slot]
        slot.loading = False
        if not good and slot.member is not None:
            slot.member.slot = None
            slot.member = None

    def begins(self, now: float) -> list[Begin]:
        """Let sequences begin, as far as slots and limits allow."""
        begun = []
        for slot in self._slots:
            member = slot.member
            if member is None or slot.loading or slot.draining:
                continue
            while len(member.running) < self._places and member.may_begin(now):
                begun.append(Begin(slot.index, self._begin(member)))
        return begun

    def next_step(self) -> int | None:
        """The slot whose step is next; None if none has anything to compute."""
        ready = [(s.member.start, s.used, s.index) for s in self._slots if s.member and s.member.running]
        if not ready:
            self._virtual = max(self._virtual, self._finished)
            return None
        self._virtual, _, index = min(ready)
        return index

    def stepped(self, slot: int, cost: float) -> None:
        """A step of ``slot`` took ``cost`` seconds."""
        self._steps += 1
        self._slots[slot].used = self._steps
        member = self._slots[slot].member
        if member is not None:
            member.start += cost / member.limits.weight
            member.served += cost / member.limits.weight
            self._finished = max(self._finished, member.start)

    def knows(self, key_id: str) -> bool:
        """Whether it is a member."""
        return key_id in self._members

    def wait(self, key_id: str, now: float) -> float:
        """Seconds for which a member's rate limit lets nothing begin."""
        return self._members[key_id].bucket.wait(now) if self.knows(key_id) else 0.0

    def next_change(self, now: float) -> float | None:
        """Seconds until a rate limit lets somebody begin; None if nobody waits for that."""
        waits = [m.bucket.wait(now) for m in self._active.values() if m.queue]
        return min((wait for wait in waits if wait > 0), default=None)

    def resident(self, key_id: str) -> bool:
        """Whether a member is in a slot, or on its way there."""
        return self._members[key_id].slot is not None

    def waiting(self) -> dict[str, int]:
        """Queued sequences of every member that has some."""
        # A copy first: metrics ask from a thread of their own.
        return {key_id: len(m.queue) for key_id, m in list(self._active.items()) if m.queue}

    def in_slots(self) -> list[str | None]:
        """Key id of each slot."""
        return [slot.member.key_id if slot.member else None for slot in self._slots]

    def _raise_floor(self) -> None:
        least = min((m.served for m in self._active.values()), default=0.0)
        self._floor = max(self._floor, least)

    def _begin(self, member: _Member) -> int:
        number = member.queue.popleft()
        member.bucket.take(self._tokens[number][1])
        if not member.running:
            member.start = max(member.start, self._virtual)
        member.running.add(number)
        return number

    def _idle(self, now: float) -> _Slot | None:
        """An empty slot, else the least recently used one of a member that has nothing to compute."""
        idle = [slot for slot in self._slots if not slot.loading and _is_idle(slot, now)]
        return min(idle, key=lambda slot: (slot.member is not None, slot.used), default=None)

    def _drain(self, wanting: list[_Member]) -> None:
        """Have as many slots draining as members wait, no more; a choice is kept once it is made."""
        draining = sorted((s for s in self._slots if s.draining), key=_service)
        for slot in draining[: max(0, len(draining) - len(wanting))]:
            slot.draining = False
        for member in wanting[len(draining) :]:
            busy = [s for s in self._slots if s.member and not s.loading and not s.draining]
            victim = max(busy, key=_service, default=None)
            if victim is None or victim.member is None:
                return
            ahead = (victim.member.served - member.served) * victim.member.limits.weight
            if ahead < self.quantum:
                return  # nor is he ahead of those who come next in this order
            victim.draining = True


def _is_idle(slot: _Slot, now: float) -> bool:
    member = slot.member
    return member is None or (not member.running and (slot.draining or not member.may_begin(now)))


def _service(slot: _Slot) -> float:
    return slot.member.served if slot.member else 0.0


def _assign(slot: _Slot, member: _Member) -> Load:
    if slot.member is not None:
        slot.member.slot = None
    slot.member, member.slot = member, slot
    slot.loading, slot.draining = True, False
    return Load(slot.index, member.key_id)
