"""From a request's body to sequences that are safe to put into a batch.

Errors name fields and limits, never what stood in them: a validation message that
quoted its input would carry a prompt into a log.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from pydantic import ValidationError

from anamorph.errors import BadRequest, NotFound, Unprocessable
from anamorph.serve.engines.base import Sampling
from anamorph.wire.inference import CompletionRequest

PLAINTEXT = "this endpoint takes encrypted token ids"


@dataclass(frozen=True)
class Limits:
    """What a request is checked against besides its own schema.

    Args:
        model: the only model name that is accepted.
        vocab_size: ids are below it.
        context_length: most tokens of prompt and answer together.
        sequences: most sequences of one request, ``n`` times prompts.
    """

    model: str
    vocab_size: int
    context_length: int
    sequences: int


@dataclass(frozen=True)
class Call:
    """A valid request: ``jobs[i]`` is answered as choice ``i``."""

    request: CompletionRequest
    jobs: tuple[tuple[tuple[int, ...], Sampling], ...]

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens, each prompt counted once however many choices it gets (as OpenAI counts)."""
        return sum(len(prompt) for prompt, sampling in self.jobs if sampling.index == 0)


def parse(body: bytes, limits: Limits, fresh_seed: int) -> Call:
    """Check a body completely.

    Args:
        body: JSON text of an ``inference.CompletionRequest``.
        limits: of this application.
        fresh_seed: used when the request brings none.

    Raises:
        Unprocessable: the prompt is text.
        NotFound: another model is named.
        BadRequest: anything else that is wrong; ``param`` names the field.
    """
    fields = _decode(body)
    if _is_text(fields.get("prompt")):
        raise Unprocessable(PLAINTEXT, code="plaintext_refused", param="prompt")
    try:
        request = CompletionRequest.model_validate(fields, strict=True)
    except ValidationError as error:
        _refuse(error)
    if request.model is not None and request.model != limits.model:
        raise NotFound(f"this endpoint serves the model {limits.model}", code="not_found", param="model")
    if request.stream_options is not None and not request.stream:
        raise _invalid("stream_options", "stream_options needs stream=true")
    prompts = _prompts(request)
    _check_ids(request, prompts, limits)
    _check_sizes(request, prompts, limits)
    return Call(request, _jobs(request, prompts, fresh_seed))


def _decode(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        # Not chained: the decoder's error holds the whole document.
        raise BadRequest("the body is not valid JSON", code="invalid_value") from None
    if not isinstance(fields, dict):
        raise BadRequest("the body is not a JSON object", code="invalid_value")
    return fields


def _no_constant(_: str) -> NoReturn:
    raise ValueError("NaN and Infinity are not JSON")


def _is_text(prompt: object) -> bool:
    return isinstance(prompt, str) or (isinstance(prompt, list) and any(isinstance(p, str) for p in prompt))


def _refuse(error: ValidationError) -> NoReturn:
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    field = str(first["loc"][0])[:64] if first["loc"] else None
    if first["type"] == "extra_forbidden":
        name = ".".join(str(part)[:64] for part in first["loc"])
        raise BadRequest(f"the field {name} is not supported", code="unknown_field", param=name) from None
    raise BadRequest(f"{field}: {first['msg']}", code="invalid_value", param=field) from None


def _invalid(field: str, message: str, code: str = "invalid_value") -> BadRequest:
    return BadRequest(message, code=code, param=field)


def _prompts(request: CompletionRequest) -> list[list[int]]:
    prompts = [p for p in request.prompt if isinstance(p, list)]
    if prompts:
        return prompts
    flat = [p for p in request.prompt if isinstance(p, int)]
    if not flat:
        raise _invalid("prompt", "prompt: there must be at least one")
    return [flat]


def _check_ids(request: CompletionRequest, prompts: list[list[int]], limits: Limits) -> None:
    bound = limits.vocab_size
    if any(max(prompt) >= bound for prompt in prompts):
        raise _invalid("prompt", f"prompt: ids are below {bound}")
    if any(token >= bound for token in request.stop_token_ids or ()):
        raise _invalid("stop_token_ids", f"stop_token_ids: ids are below {bound}")
    for key, bias in (request.logit_bias or {}).items():
        if not key.isascii() or not key.isdecimal() or str(int(key[:20])) != key or int(key) >= bound:
            raise _invalid("logit_bias", f"logit_bias: keys are ids below {bound}, as decimal strings")
        if not -100 <= bias <= 100:  # also refuses NaN
            raise _invalid("logit_bias", "logit_bias: values are between -100 and 100")


def _check_sizes(request: CompletionRequest, prompts: list[list[int]], limits: Limits) -> None:
    longest = max(len(prompt) for prompt in prompts)
    if longest + request.max_tokens > limits.context_length:
        field = "prompt" if longest >= limits.context_length else "max_tokens"
        raise _invalid(
            field,
            f"prompt and max_tokens together are {limits.context_length} tokens at most",
            "context_length_exceeded",
        )
    if len(prompts) * request.n > limits.sequences:
        raise _invalid("n", f"a request has {limits.sequences} sequences at most (n times prompts)")


def _jobs(
    request: CompletionRequest, prompts: list[list[int]], fresh_seed: int
) -> tuple[tuple[tuple[int, ...], Sampling], ...]:
    samplings = [_sampling(request, fresh_seed, index) for index in range(request.n)]
    return tuple((tuple(prompt), sampling) for prompt in prompts for sampling in samplings)


def _sampling(request: CompletionRequest, fresh_seed: int, index: int) -> Sampling:
    return Sampling(
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        seed=fresh_seed if request.seed is None else request.seed,
        index=index,
        logprobs=request.logprobs,
        logit_bias={int(key): bias for key, bias in (request.logit_bias or {}).items()},
        stop_ids=frozenset(request.stop_token_ids or ()),
        ignore_eos=request.ignore_eos,
    )
