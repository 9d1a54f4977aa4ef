"""Messages of the inference endpoints: OpenAI completions whose text is token ids.

Field names are OpenAI's and vLLM's. ``prompt`` holds encrypted ids, choices carry
``token_ids`` and an empty ``text``. Tokens in ``logprobs`` read ``token_id:N``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

KEY_ID_HEADER = "Anamorph-Key-Id"
# ``system_fingerprint`` of an answer without a key; of all others it is the key id.
PLAINTEXT_FINGERPRINT = "plaintext"

TokenIds = Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """``POST {endpoint}/v1/completions``; a field that is not here is a 400 that names it.

    ``seed`` makes sampling repeatable within one key version only. ``logit_bias``
    maps encrypted ids, as decimal strings, to a bias in [-100, 100].
    """

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    prompt: TokenIds | list[TokenIds]
    max_tokens: int = Field(default=16, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    top_k: int = Field(default=0, ge=0, description="0 keeps every token")
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: int = Field(default=1, ge=1, le=16)
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)
    logit_bias: dict[str, float] | None = Field(default=None, max_length=1024)
    stop_token_ids: list[Annotated[int, Field(ge=0, strict=True)]] | None = Field(default=None, max_length=64)
    ignore_eos: bool = False
    return_token_ids: bool = Field(default=False, description="also echo prompt_token_ids, as vLLM does")
    user: str | None = Field(
        default=None, max_length=256, description="accepted as in OpenAI; not used, not logged"
    )


class Logprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int] = []


class Choice(BaseModel):
    index: int
    text: str = ""
    token_ids: list[int]
    prompt_token_ids: list[int] | None = None
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: int | None = Field(
        default=None, description="the stop token id that ended it, if one of stop_token_ids"
    )


class CompletionUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """A whole answer, or one chunk of a stream (then ``choices`` holds what is new)."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: CompletionUsage | None = None
