"""What a caller may ask, in OpenAI's words.

Nothing is ignored: a field is used, or has a value that changes nothing, or is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from anamorph.errors import BadRequest
from anamorph.wire.inference import StreamOptions

# Fields that change nothing at these values, which clients and frameworks often send;
# at any other value they would change the answer, and are refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
}

TokenId = Annotated[int, Field(ge=0)]
TokenName = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]
R = TypeVar("R", bound="Request")


class Request(BaseModel):
    """What chats and completions have in common."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(default=1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    top_k: int = Field(default=0, ge=0)
    n: int = Field(default=1, ge=1, le=16)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] = []
    logit_bias: dict[TokenName, Bias] = Field(default={}, max_length=1024)
    user: str | None = Field(default=None, max_length=256)

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Request:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams; set stream too")
        return self


class TextPart(BaseModel):
    """A part of a message; only text exists here."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat. Fields of answers that are null may be sent back as they came."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: item for key, item in value.items() if item not in (None, []) or key == "content"}

    def plain(self) -> dict[str, str]:
        """The message as a chat template reads it."""
        content = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content} | ({"name": self.name} if self.name else {})


class ChatRequest(Request):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ; send one of them")
        return self


class CompletionRequest(Request):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: int = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=20)


def parse(kind: type[R], body: Any) -> R:
    """Read a request.

    Raises:
        BadRequest: it is no object, or a field is unknown, unsupported or has a value
            outside its range; the error names the field and not its value.
    """
    if not isinstance(body, dict):
        raise BadRequest("the body is not a JSON object", code="invalid_value")
    wanted = {name: value for name, value in body.items() if not _neutral(kind, name, value)}
    try:
        return kind.model_validate(wanted)
    except ValidationError as error:
        raise _bad_request(error) from None


def _neutral(kind: type[Request], name: str, value: Any) -> bool:
    if name in kind.model_fields:
        return value is None  # OpenAI's clients may send null for "not given"
    if name not in NEUTRAL:
        return False
    if any(value == neutral and type(value) in (type(neutral), float) for neutral in NEUTRAL[name]):
        return True
    raise BadRequest(f"{name} is not supported", code="unsupported", param=name)


def _bad_request(error: ValidationError) -> BadRequest:
    first: Mapping[str, Any] = error.errors(include_input=False, include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return BadRequest(f"{where} is not a known field", code="unknown_field", param=where)
    if first["type"] == "missing":
        return BadRequest(f"{where} is missing", code="invalid_value", param=where)
    message = f"{where}: {first['msg']}" if where else str(first["msg"])
    return BadRequest(message, code="invalid_value", param=where or None)
