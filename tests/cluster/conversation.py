"""Clients that keep asking through a tenant's proxy, and what they were told."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import openai

QUESTION, RIGHT = "What is the capital of France?", "The capital of France is Paris."
"""SmolLM2's greedy answer, far from any other by its logits, in every dtype."""
MOST_TOKENS = 32
"""Of an answer."""


@dataclass
class Said:
    """What became of the questions."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return f"{self.right} right, wrong: {self.wrong}, failed: {dict(self.failed)}"


def ask(client: openai.OpenAI, model: str = "smol") -> str:
    """The answer to one question.

    Raises:
        openai.APIError: there is none.
    """
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        max_completion_tokens=MOST_TOKENS,
        temperature=0,
        stream=True,
    )
    return "".join(part.choices[0].delta.content or "" for part in answer if part.choices)


def client(url: str) -> openai.OpenAI:
    """One without second attempts: each failure is seen."""
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)


@contextmanager
def asking(url: str, clients: int = 2, model: str = "smol") -> Iterator[Said]:
    """Clients that stream one answer after the other for as long as the block takes."""
    said, stop, lock = Said(), threading.Event(), threading.Lock()

    def keep_asking() -> None:
        with client(url) as one:
            while not stop.is_set():
                try:
                    answer = ask(one, model).strip()
                except openai.APIError as error:
                    with lock:
                        said.failed[f"{type(error).__name__}: {error}"[:200]] += 1
                    time.sleep(0.5)
                    continue
                with lock:
                    if answer == RIGHT:
                        said.right += 1
                    else:
                        said.wrong.append(answer)

    threads = [threading.Thread(target=keep_asking) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield said
    finally:
        stop.set()
        for thread in threads:
            thread.join()
