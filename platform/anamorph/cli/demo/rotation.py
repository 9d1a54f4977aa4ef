"""Step 4: a key is rotated while clients keep asking; every answer is compared with the expected one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.live import Live
from rich.table import Table

from anamorph.cli.demo.refusals import ask, show
from anamorph.cli.demo.stage import ACME, Stage
from anamorph.cli.machine.home import MODEL
from anamorph.client import AsyncClient
from anamorph.errors import AnamorphError, MaterializationError
from anamorph.wire.admin import KeyVersionRead
from anamorph.wire.keyservice import AsyncKeyService, aeverything
from anamorph.wire.states import State

CLIENTS = 4
MAX_TOKENS = 12
LONGEST_S = 900
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time there was a",
    "The three primary colours are",
    "In the morning I like to drink",
    "The largest planet of the solar system is",
)


@dataclass(frozen=True)
class Question:
    """A prompt and its greedy answer, in plain ids."""

    prompt: tuple[int, ...]
    expected: tuple[int, ...]


@dataclass
class Tally:
    """What the clients met so far; seconds."""

    sent: int = 0
    failed: int = 0
    wrong: int = 0
    longest: float = 0.0
    failures: list[str] = field(default_factory=list)

    def table(self, versions: Sequence[KeyVersionRead]) -> Table:
        """The tally as it stands, with the state of each version."""
        table = Table("requests sent", "failed", "answered with a wrong key", "longest wait", "versions")
        wait = f"{self.longest:.2f} s"
        table.add_row(str(self.sent), str(self.failed), str(self.wrong), wait, _spelled(versions))
        return table


def _spelled(versions: Sequence[KeyVersionRead]) -> str:
    return "  ".join(f"v{version.version} {version.state.value}" for version in versions)


def rotate_under_load(stage: Stage) -> None:
    """Rotate acme's key under load; then show that version 1 is gone."""
    with stage.console.status("the plaintext model computes the expected answers in this process"):
        questions = expected_answers(stage)
    tally = asyncio.run(_rotate(stage, questions))
    with stage.keys(ACME) as keys:
        stage.console.print(tally.table([keys.get_version(ACME, MODEL, number) for number in (1, 2)]))
        first = keys.get_version(ACME, MODEL, 1)
    stage.check(tally.sent > 0 and tally.failed == 0, f"{tally.sent} requests sent, {tally.failed} failed")
    stage.check(tally.wrong == 0, f"{tally.wrong} answered with a wrong key")
    for failure in sorted(set(tally.failures)):
        stage.console.print(f"    {failure}")
    show(stage, [ask(stage, first, "the retired version 1", 410)])


def expected_answers(stage: Stage) -> list[Question]:
    """Greedy answers of the plaintext model, computed by the tenant."""
    prompts = [tuple(stage.tokenizer.encode(text)) for text in PROMPTS]
    return [Question(prompt, tuple(stage.plain.greedy(prompt, MAX_TOKENS))) for prompt in prompts]


async def _rotate(stage: Stage, questions: list[Question]) -> Tally:
    tally, stop = Tally(), asyncio.Event()
    admin = AsyncKeyService(stage.urls["keysvc"], stage.home.api_key(ACME, "admin").read_text().strip())
    async with admin:
        loads = [asyncio.create_task(_keep_asking(stage, questions, tally, stop, n)) for n in range(CLIENTS)]
        try:
            await _see_it_through(stage, admin, tally)
        finally:
            stop.set()
            await asyncio.gather(*loads)
    return tally


async def _see_it_through(stage: Stage, admin: AsyncKeyService, tally: Tally) -> None:
    """From the request to rotate until version 1 is retired and its application gone."""
    deadline, states = time.monotonic() + LONGEST_S, dict[int, State]()
    with Live(console=stage.console, refresh_per_second=4, transient=True) as live:
        await asyncio.sleep(2)
        await admin.rotate(ACME, MODEL)
        while time.monotonic() < deadline:
            versions = [one async for one in aeverything(admin.list_versions, ACME, MODEL)]
            versions.sort(key=lambda version: version.version)
            live.update(tally.table(versions))
            before, states = states, {version.version: version.state for version in versions}
            if states != before:
                stage.console.print(f"  {_spelled(versions)}  after {tally.sent} requests", highlight=False)
            if states.get(2) is State.FAILED:
                raise MaterializationError("version 2 failed; the operator's log says why")
            if states[1] is State.RETIRED:
                break
            await asyncio.sleep(0.5)
        await asyncio.sleep(2)
    stage.check(states == {1: State.RETIRED, 2: State.ACTIVE}, "version 2 is active, version 1 is retired")


async def _keep_asking(
    stage: Stage, questions: list[Question], tally: Tally, stop: asyncio.Event, first: int
) -> None:
    """One client, with its own key cache, asking one question after the other."""
    number = first
    async with AsyncClient(stage.urls["keysvc"], stage.api_key(ACME), ACME, MODEL) as client:
        while not stop.is_set():
            await _ask_one(client, questions[number % len(questions)], tally)
            number += 1


async def _ask_one(client: AsyncClient, question: Question, tally: Tally) -> None:
    began = time.monotonic()
    tally.sent += 1
    try:
        answer = await client.complete(list(question.prompt), max_tokens=MAX_TOKENS, temperature=0)
    except AnamorphError as error:
        tally.failed += 1
        tally.failures.append(f"{type(error).__name__}: {error}")
    else:
        tally.wrong += tuple(answer.choices[0].token_ids) != question.expected
    tally.longest = max(tally.longest, time.monotonic() - began)
