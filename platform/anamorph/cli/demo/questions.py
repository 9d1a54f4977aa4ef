"""Step 2: three questions, what crossed the wire, and the answers."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING

from rich.panel import Panel
from rich.table import Table

from anamorph.cli.demo.stage import ACME, Stage
from anamorph.cli.machine.home import MODEL
from anamorph.client import Client
from anamorph.client.tokenizer import Tokenizer

if TYPE_CHECKING:
    from openai import OpenAI

QUESTIONS = (
    ("What is the capital of France?", False),
    ("Why is the sky blue? Answer in one sentence.", True),
    ("Write a short poem about the sea.", False),
)
MAX_TOKENS = 40
_SHOWN = 16


def ask_questions(stage: Stage) -> None:
    """Ask through the proxy and compare with the plaintext model's greedy answers."""
    import openai

    url = stage.urls[f"proxy-{ACME}"]
    with openai.OpenAI(base_url=url, api_key="local") as client:
        for question, streamed in QUESTIONS:
            answer = _ask(stage, client, question, streamed)
            _show(stage, question, answer, streamed)
            _compare(stage, question, answer)


def _ask(stage: Stage, client: OpenAI, question: str, streamed: bool) -> str:
    with stage.console.status(f"asking: {question}"):
        if not streamed:
            whole = client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": question}],
                temperature=0,
                max_tokens=MAX_TOKENS,
            )
            return whole.choices[0].message.content or ""
        chunks = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=MAX_TOKENS,
            stream=True,
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def _show(stage: Stage, question: str, answer: str, streamed: bool) -> None:
    plain = stage.tokenizer.encode_chat([{"role": "user", "content": question}])
    # The same codec as the proxy's, in this process: nothing in the compute zone writes ids down.
    with Client(stage.urls["keysvc"], stage.api_key(ACME), ACME, MODEL) as client:
        wire = client.lease().codec.encrypt(plain)
    table = Table.grid(padding=(0, 2))
    table.add_row("question", question)
    table.add_row(
        "on the wire", " ".join(map(str, wire[-_SHOWN:])) + f"   (last {_SHOWN} of {len(wire)} ids)"
    )
    table.add_row("read in clear", repr(stage.tokenizer.decode(list(wire[-_SHOWN:]))))
    table.add_row("answer", answer)
    stage.console.print(Panel(table, title="streamed" if streamed else None, title_align="left"))


def _compare(stage: Stage, question: str, answer: str) -> None:
    """float32: equal. Shorter types may part ways where two tokens are almost equally likely."""
    prompt = stage.tokenizer.encode_chat([{"role": "user", "content": question}])
    with stage.console.status("the plaintext model answers in this process"):
        expected = stage.tokenizer.decode(stage.plain.greedy(prompt, MAX_TOKENS))
    if answer == expected:
        stage.check(True, "equals the plaintext model's greedy answer")
    elif stage.dtype == "float32":
        stage.check(False, f"equals the plaintext model's greedy answer, which is {expected!r}")
    else:
        stage.check(True, f"{stage.dtype}: {first_difference(stage.tokenizer, answer, expected)}")


def first_difference(tokenizer: Tokenizer, answer: str, expected: str) -> str:
    """Where two answers part, and with which tokens; an answer that is over there has the empty one."""
    ours, theirs = tokenizer.encode(answer), tokenizer.encode(expected)
    pairs = zip_longest(ours, theirs)
    place = next((index for index, (a, b) in enumerate(pairs) if a != b), len(ours))
    mine, plain = (tokenizer.decode(ids[place : place + 1]) for ids in (ours, theirs))
    return f"token {place + 1} is {mine!r}, in the plaintext model's greedy answer {plain!r}"
