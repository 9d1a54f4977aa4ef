"""From a caller's text to what goes upstream: prompts of ids, and options over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anamorph.client.exchange import Options
from anamorph.client.proxy.requests import ChatRequest, CompletionRequest, Request
from anamorph.client.tokenizer import Tokenizer
from anamorph.errors import BadRequest

MAX_PROMPTS = 64


@dataclass(frozen=True)
class Job:
    """One request upstream; choice ``i`` answers prompt ``i // n``.

    ``continues`` says that the answer goes on where the prompt's text ends, so that
    what its first token reads as depends on the prompt's last ones.
    """

    prompts: list[list[int]]
    options: Options
    n: int
    stops: tuple[str, ...]
    continues: bool

    @property
    def choices(self) -> int:
        """Number of answers."""
        return len(self.prompts) * self.n


def chat_job(request: ChatRequest, tokenizer: Tokenizer, context_length: int) -> Job:
    """The job of a chat; without a limit the answer may fill the rest of the context."""
    prompt = tokenizer.encode_chat([message.plain() for message in request.messages])
    room = _room(prompt, context_length, "messages")
    options = _options(request, tokenizer)
    options["max_tokens"] = request.max_completion_tokens or request.max_tokens or room
    if request.logprobs:
        options["logprobs"] = request.top_logprobs
    return Job([prompt], options, request.n, request.stops, continues=False)


def completion_job(request: CompletionRequest, tokenizer: Tokenizer, context_length: int) -> Job:
    """The job of a completion of one or several prompts."""
    prompts = _prompts(request.prompt, tokenizer)
    for prompt in prompts:
        _room(prompt, context_length, "prompt")
    options = _options(request, tokenizer)
    options["max_tokens"] = request.max_tokens
    options["logprobs"] = request.logprobs
    return Job(prompts, options, request.n, request.stops, continues=True)


def _prompts(
    prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]], tokenizer: Tokenizer
) -> list[list[int]]:
    several: Any = prompt
    if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
        several = [prompt]
    if len(several) > MAX_PROMPTS:
        raise BadRequest(f"at most {MAX_PROMPTS} prompts", code="invalid_value", param="prompt")
    ids = [tokenizer.encode(one) if isinstance(one, str) else list(one) for one in several]
    if not all(ids):
        raise BadRequest("the prompt is empty", code="invalid_value", param="prompt")
    if any(token >= tokenizer.size for one in ids for token in one):
        raise BadRequest("the prompt holds ids beyond the tokenizer's", code="invalid_value", param="prompt")
    return ids


def _room(prompt: list[int], context_length: int, param: str) -> int:
    room = context_length - len(prompt)
    if room < 1:
        raise BadRequest(
            f"the prompt has {len(prompt)} tokens, this model's context {context_length}; shorten it",
            code="context_length_exceeded",
            param=param,
        )
    return room


def _options(request: Request, tokenizer: Tokenizer) -> Options:
    bias = {int(token): value for token, value in request.logit_bias.items()}
    if any(token >= tokenizer.size for token in bias):
        raise BadRequest("no such token id", code="invalid_value", param="logit_bias")
    return Options(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        n=request.n,
        seed=request.seed,
        logit_bias=bias or None,
    )
