"""From upstream's ids to text: detokenised, cut at stop strings, with its logprobs, as it arrives."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass

from anamorph.client.client import AsyncClient
from anamorph.client.detokenize import Detokenizer
from anamorph.client.exchange import token_id
from anamorph.client.proxy.jobs import Job
from anamorph.client.stops import StopFinder
from anamorph.client.tokenizer import Piece, Tokenizer
from anamorph.wire.inference import Choice, CompletionUsage, Logprobs

# Enough of a prompt's end to hold any character and the word before it.
_CONTEXT = 8


@dataclass(frozen=True)
class TokenLogprob:
    """One token of an answer: where its text starts, and the most likely ones at its place."""

    token: Piece
    logprob: float | None
    offset: int
    top: tuple[tuple[Piece, float], ...]


@dataclass(frozen=True)
class Delta:
    """What is new in one choice."""

    index: int
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    key_id: str = ""


class Answer:
    """One choice in the making."""

    def __init__(self, index: int, job: Job, tokenizer: Tokenizer) -> None:
        context = job.prompts[index // job.n][-_CONTEXT:] if job.continues else []
        self._index = index
        self._tokenizer = tokenizer
        self._text = Detokenizer(tokenizer.decode, context)
        self._stops = StopFinder(job.stops)
        self._read = 0  # characters detokenised
        self._given = 0  # characters given out: behind by what may begin a stop string
        self._waiting: list[TokenLogprob] = []
        self.finished = False

    def push(self, choice: Choice, key_id: str) -> Delta:
        """Take upstream's next ids of this choice."""
        text = self._take(choice)
        reason: str | None = choice.finish_reason
        if reason is not None and not self._stops.found:
            text += self._stops.push(self._text.flush())
            if not self._stops.found:
                text += self._stops.flush()
        reason = "stop" if self._stops.found else reason
        self.finished = reason is not None
        self._given += len(text)
        return Delta(self._index, text, self._release(), reason, key_id)

    def _take(self, choice: Choice) -> str:
        out = ""
        for position, token in enumerate(choice.token_ids):
            text = self._text.push(token)
            if choice.logprobs is not None:
                self._waiting.append(self._logprob(choice.logprobs, position, text))
            self._read += len(text)
            out += self._stops.push(text)
            if self._stops.found:
                break
        return out

    def _release(self) -> tuple[TokenLogprob, ...]:
        """Logprobs of tokens whose text has been given out; at the end all, but none after a stop."""
        last = self.finished and not self._stops.found
        out = tuple(token for token in self._waiting if last or token.offset < self._given)
        self._waiting = self._waiting[len(out) :]
        return out

    def _logprob(self, logprobs: Logprobs, position: int, text: str) -> TokenLogprob:
        token = self._piece(logprobs.tokens[position])
        # ``text`` may begin with the end of the token before, which had been held back.
        offset = self._read + (len(text) - len(token.text) if text.endswith(token.text) else 0)
        top = logprobs.top_logprobs[position] if position < len(logprobs.top_logprobs) else {}
        return TokenLogprob(token, logprobs.token_logprobs[position], offset, self._top(top))

    def _top(self, top: Mapping[str, float]) -> tuple[tuple[Piece, float], ...]:
        ranked = sorted(top.items(), key=lambda item: -item[1])
        return tuple((self._piece(name), value) for name, value in ranked)

    def _piece(self, name: str) -> Piece:
        return self._tokenizer.piece(token_id(name))


async def answer(
    client: AsyncClient, tokenizer: Tokenizer, job: Job
) -> AsyncGenerator[Delta | CompletionUsage]:
    """What is new, choice by choice, and at the end the usage.

    Upstream is closed, and with it the generation, as soon as every choice is
    finished or this generator is closed.
    """
    answers = [Answer(index, job, tokenizer) for index in range(job.choices)]
    tokens, usage = 0, None
    async with aclosing(client.stream(job.prompts, **job.options)) as chunks:
        async for chunk in chunks:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                tokens += len(choice.token_ids)
                if not answers[choice.index].finished:
                    yield answers[choice.index].push(choice, chunk.system_fingerprint)
            if job.stops and all(one.finished for one in answers):
                break
    prompt = sum(len(one) for one in job.prompts)
    yield usage or CompletionUsage(
        prompt_tokens=prompt, completion_tokens=tokens, total_tokens=prompt + tokens
    )
