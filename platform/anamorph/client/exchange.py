"""Completion requests and answers, from plain ids to encrypted ids and back. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from anamorph.client.codec import TokenCodec
from anamorph.errors import BadRequest, ServiceError
from anamorph.wire.inference import Choice, Completion, Logprobs

Prompt = Sequence[int] | Sequence[Sequence[int]]
_TOKEN_PREFIX = "token_id:"  # noqa: S105 - how the wire spells a token, no credential


class Options(TypedDict):
    """Options of a completion; ids in them are plain. See ``inference.CompletionRequest``."""

    max_tokens: NotRequired[int]
    temperature: NotRequired[float]
    top_p: NotRequired[float]
    top_k: NotRequired[int]
    seed: NotRequired[int | None]
    n: NotRequired[int]
    logprobs: NotRequired[int | None]
    logit_bias: NotRequired[Mapping[int, float] | None]
    stop_token_ids: NotRequired[Sequence[int] | None]
    ignore_eos: NotRequired[bool]
    return_token_ids: NotRequired[bool]
    user: NotRequired[str | None]


def encrypt_request(codec: TokenCodec, prompt: Prompt, options: Options) -> dict[str, Any]:
    """The request as it goes over the wire.

    Raises:
        BadRequest: no prompt, an empty one, or an id outside the vocabulary.
    """
    request: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    request["prompt"] = _encrypt_prompt(codec, prompt)
    bias = options.get("logit_bias")
    if bias is not None:
        request["logit_bias"] = _encrypt_bias(codec, bias)
    stops = options.get("stop_token_ids")
    if stops is not None:
        request["stop_token_ids"] = codec.encrypt(stops)
    return request


def decrypt_completion(codec: TokenCodec, completion: Completion) -> Completion:
    """The same answer or chunk with plain ids.

    Raises:
        ServiceError: the answer holds something that is no id of this vocabulary.
    """
    try:
        choices = [_decrypt_choice(codec, choice) for choice in completion.choices]
    except BadRequest:
        raise ServiceError("the endpoint answered with ids outside the vocabulary: it is discarded") from None
    return completion.model_copy(update={"choices": choices})


def _encrypt_prompt(codec: TokenCodec, prompt: Prompt) -> list[int] | list[list[int]]:
    if len(prompt) and isinstance(prompt[0], Sequence):
        prompts = [codec.encrypt(one) for one in prompt]  # type: ignore[arg-type]  # all or none nest
        if all(prompts):
            return prompts
    elif len(prompt):
        return list(codec.encrypt(prompt))  # type: ignore[arg-type]  # as above
    raise BadRequest("the prompt is empty", code="invalid_value", param="prompt")


def _encrypt_bias(codec: TokenCodec, bias: Mapping[int, float]) -> dict[str, float]:
    encrypted = codec.encrypt(list(bias))
    return {str(key): value for key, value in zip(encrypted, bias.values(), strict=True)}


def _decrypt_choice(codec: TokenCodec, choice: Choice) -> Choice:
    update: dict[str, Any] = {"token_ids": codec.decrypt(choice.token_ids)}
    if choice.prompt_token_ids is not None:
        update["prompt_token_ids"] = codec.decrypt(choice.prompt_token_ids)
    if choice.stop_reason is not None:
        update["stop_reason"] = codec.decrypt([choice.stop_reason])[0]
    if choice.logprobs is not None:
        update["logprobs"] = _decrypt_logprobs(codec, choice.logprobs)
    return choice.model_copy(update=update)


def _decrypt_logprobs(codec: TokenCodec, logprobs: Logprobs) -> Logprobs:
    return logprobs.model_copy(
        update={
            "tokens": _decrypt_names(codec, logprobs.tokens),
            "top_logprobs": [
                dict(zip(_decrypt_names(codec, list(top)), top.values(), strict=True))
                for top in logprobs.top_logprobs
            ],
        }
    )


def _decrypt_names(codec: TokenCodec, names: Sequence[str]) -> list[str]:
    return [f"{_TOKEN_PREFIX}{plain}" for plain in codec.decrypt([token_id(name) for name in names])]


def token_id(name: str) -> int:
    """The id in a logprob's token name, ``token_id:N``.

    Raises:
        BadRequest: ``name`` does not read so.
    """
    digits = name.removeprefix(_TOKEN_PREFIX)
    if digits == name or not (digits.isascii() and digits.isdigit()):
        raise BadRequest("a token name in logprobs does not read token_id:N", code="invalid_value")
    return int(digits)
