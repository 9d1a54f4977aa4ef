"""The bookkeeping of load, rotation and chaos runs: what a request met is counted as what it was."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.chaos import Chaos, by_fault
from benchmarks.rotations import ratio
from benchmarks.trial.clients import (
    Caller,
    Met,
    Outcome,
    Question,
    arrivals,
    failures,
    fake_answer,
    tally,
    verdict,
)
from benchmarks.trial.faults import FAULTS, Struck, sequence
from benchmarks.trial.stand import VOCAB, fake_model
from tests.client.stack import Faulty, Stack, running_stack

from anamorph import errors
from anamorph.client.tokenizer import Tokenizer
from anamorph.keys import TenantKey

QUESTION = Question((5, 3, 9), 6)


def engine(key: TenantKey, **options: Any) -> Faulty:
    return Faulty(key.id, vocab_size=VOCAB, **options)


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """Key service and a fake engine that can fail, on real sockets."""
    tokenizer = Tokenizer(fake_model(tmp_path / "model", 0).folder)
    with running_stack(tmp_path, tokenizer, engine) as running:
        yield running


@asynccontextmanager
async def calling(stack: Stack, vocab_size: int = VOCAB, **limits: float) -> AsyncGenerator[Caller]:
    """A client of the stack."""
    expected = fake_answer(vocab_size)
    caller = Caller(stack.keysvc_url, stack.api_key, stack.tenant, stack.model, expected, **limits)
    try:
        yield caller
    finally:
        await caller.close()


async def ask(stack: Stack, vocab_size: int = VOCAB, **limits: float) -> Met:
    async with calling(stack, vocab_size, **limits) as caller:
        return await caller.ask(QUESTION, time.monotonic())


async def test_a_right_answer(stack: Stack) -> None:
    """All tokens there and as expected; times count from the intended start."""
    async with calling(stack) as caller:
        met = await caller.ask(QUESTION, time.monotonic() - 100)
    assert (met.outcome, met.tokens, met.detail) == (Outcome.RIGHT, 6, "")
    assert met.first_s is not None
    assert 100 < met.first_s <= met.seconds


async def test_a_right_answer_after_a_rotation(stack: Stack) -> None:
    """The client moves to the next key, and its answer is judged by that."""
    async with calling(stack) as caller:
        first = await caller.ask(QUESTION, time.monotonic())
        stack.rotate()
        stack.tell(1, "gone")
        second = await caller.ask(QUESTION, time.monotonic())
    assert [first.outcome, second.outcome] == [Outcome.RIGHT, Outcome.RIGHT]
    assert first.key_id != second.key_id


async def test_a_wrong_answer_is_seen(stack: Stack) -> None:
    """Other ids than expected, here those of another vocabulary."""
    met = await ask(stack, vocab_size=VOCAB - 1)
    assert met.outcome is Outcome.WRONG
    assert met.detail.startswith("6 ids of 6; the first other is number")


async def test_a_broken_engine_is_a_documented_error(stack: Stack) -> None:
    """What the engine cannot answer ends in one of the three errors, within the client's patience."""
    vars(stack.endpoint(1).engine)["fails"] = True
    met = await ask(stack, retry_for=0.5)
    assert met.outcome is Outcome.REFUSED
    assert met.detail.startswith("Unavailable 503: ")


async def test_a_hang_is_a_hang(stack: Stack) -> None:
    """What ends neither in an answer nor in an error is noted at its deadline, with where it waited."""
    stack.rotate(delay_s=30)
    met = await ask(stack, deadline_s=0.5)
    assert met.outcome is Outcome.HUNG
    assert " > _open:" in met.detail


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (errors.StreamInterrupted("x"), Outcome.REFUSED),
        (errors.Unavailable("x"), Outcome.REFUSED),
        (errors.TooManyRequests("x"), Outcome.REFUSED),
        (errors.KeyMismatch("x"), Outcome.WRONG),
        (errors.NotFound("x"), Outcome.STRANGE),
        (RuntimeError("x"), Outcome.STRANGE),
    ],
)
def test_errors_count_as_documented_or_not(error: Exception, outcome: Outcome) -> None:
    """Three errors are promised while something is broken; another key's answer is wrong, others strange."""
    assert verdict(error) is outcome


async def test_arrivals_do_not_wait_for_answers(stack: Stack) -> None:
    """With an engine that takes a second, requests still start at their times: that is an open loop."""
    stack.rotate(delay_s=0.2)
    met: list[Met] = []
    stop = asyncio.Event()
    async with calling(stack) as caller:
        load = asyncio.create_task(arrivals([caller], lambda _: QUESTION, 40, stop, 1, met))
        await asyncio.sleep(1)
        stop.set()
        await load
    assert len(met) > 3  # a client that waited for its answers would have sent one
    assert min(one.seconds for one in met) > 1
    assert {one.outcome for one in met} == {Outcome.RIGHT}


def met(at: float, outcome: Outcome, seconds: float = 1.0) -> Met:
    return Met("acme", at, seconds, outcome)


def test_a_report_keeps_whatever_was_not_right() -> None:
    """Each with its moment and cause; right answers are left out."""
    [kept] = failures([met(105, Outcome.HUNG, 90), met(100, Outcome.RIGHT)])
    assert (kept["at_s"], kept["outcome"], kept["seconds"]) == (5, "past its deadline", 90)


def test_requests_are_counted_with_the_fault_that_they_met() -> None:
    """Under way when it struck, begun during it or shortly after; others are left out."""
    faults = [Struck("store", 100, 110), Struck("store", 200, 210), Struck("node", 300, 310)]
    seen = [met(98, Outcome.REFUSED, 3), met(105, Outcome.REFUSED, 7), met(111, Outcome.RIGHT)]
    seen += [met(90, Outcome.HUNG), met(205, Outcome.RIGHT), met(250, Outcome.HUNG)]
    found = by_fault(faults, seen)
    assert found["store"]["times"] == 2
    assert (found["store"]["right"], found["store"]["documented error"]) == (2, 2)
    assert found["store"]["longest_s"] == 7
    assert found["node"] == {"times": 1, "longest_s": 0.0} | tally([])


@pytest.mark.parametrize("outcome", [Outcome.WRONG, Outcome.STRANGE, Outcome.HUNG])
def test_one_bad_request_breaks_the_promise(outcome: Outcome) -> None:
    """Right answers and documented errors do not; anything else does, once is enough."""
    good = [met(1, Outcome.RIGHT), met(2, Outcome.REFUSED)]
    assert Chaos(met=good, back_s=10).broken == []
    assert Chaos(met=[*good, met(3, outcome)], back_s=10).broken == [f"1 requests: {outcome.value}"]


def test_what_stays_down_or_behind_breaks_the_promise() -> None:
    """Not back, back too late, or something left."""
    assert "controller" in Chaos(amiss=["controller"]).broken[0]
    assert Chaos(back_s=61).broken == ["back only after 61 s"]
    assert Chaos(back_s=1, left=["a process"]).broken == ["left behind: a process"]
    assert Chaos(back_s=1, unrepaired=["node failed"]).broken == ["node failed"]


def test_no_fault_is_left_to_chance() -> None:
    """Each comes once before any comes again, and a seed repeats itself."""
    drawn = [sequence(FAULTS, np.random.default_rng(5)) for _ in range(2)]
    names = [[next(one).name for _ in FAULTS] for one in drawn]
    assert sorted(names[0]) == sorted(fault.name for fault in FAULTS)
    assert names[0] == names[1]


def test_the_ratio_of_percentiles_has_its_interval() -> None:
    """Twice as slow is a ratio of two, between its bounds; the same is one."""
    source = np.random.default_rng(1)
    base = source.exponential(1, 4000).tolist()
    value, low, high = ratio(base, [2 * x for x in base])
    assert value == pytest.approx(2)
    assert low < 2 < high
