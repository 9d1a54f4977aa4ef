"""Answers in OpenAI's shapes: chats and completions, whole and in chunks, and errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.responses import JSONResponse

from anamorph import errors
from anamorph.client.proxy.answers import Delta, TokenLogprob
from anamorph.client.tokenizer import Piece
from anamorph.wire import problems
from anamorph.wire.inference import CompletionUsage

# Errors that are no answer of a service: the endpoint upstream did not keep its word.
_BAD_GATEWAY = (errors.KeyMismatch, errors.StreamInterrupted)


@dataclass(frozen=True)
class Head:
    """What every object of one answer repeats."""

    id: str
    created: int
    model: str


class Shape(Protocol):
    """How one kind of request is answered."""

    def whole(self, deltas: Sequence[Delta], usage: CompletionUsage) -> dict[str, Any]:
        """The answer to a request without ``stream``; ``deltas`` in order of arrival."""

    def chunks(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """The chunks that one delta becomes."""

    def usage(self, usage: CompletionUsage) -> dict[str, Any]:
        """The chunk that carries the usage."""


class ChatShape:
    """``chat.completion`` and its chunks."""

    def __init__(self, head: Head, *, logprobs: bool, include_usage: bool) -> None:
        self._head, self._logprobs = head, logprobs
        self._more: dict[str, Any] = {"usage": None} if include_usage else {}
        self._begun: set[int] = set()

    def whole(self, deltas: Sequence[Delta], usage: CompletionUsage) -> dict[str, Any]:
        """See ``Shape``."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": self._tokens(tokens),
                "finish_reason": reason,
            }
            for index, text, tokens, reason in _joined(deltas)
        ]
        return _object(self._head, "chat.completion", deltas) | {
            "choices": choices,
            "usage": usage.model_dump(),
        }

    def chunks(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """See ``Shape``. A choice begins with its role and ends with its finish reason, as OpenAI's do."""
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            yield self._chunk(delta, {"role": "assistant", "content": ""}, None, None)
        if delta.text or delta.logprobs:
            yield self._chunk(delta, {"content": delta.text}, self._tokens(delta.logprobs), None)
        if delta.finish_reason is not None:
            yield self._chunk(delta, {}, None, delta.finish_reason)

    def usage(self, usage: CompletionUsage) -> dict[str, Any]:
        """See ``Shape``."""
        return _object(self._head, "chat.completion.chunk", ()) | {"choices": [], "usage": usage.model_dump()}

    def _chunk(
        self, delta: Delta, content: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None
    ) -> dict[str, Any]:
        choice = {"index": delta.index, "delta": content, "logprobs": logprobs, "finish_reason": reason}
        return _object(self._head, "chat.completion.chunk", (delta,)) | {"choices": [choice]} | self._more

    def _tokens(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = [
            _entry(one.token, one.logprob)
            | {"top_logprobs": [_entry(token, value) for token, value in one.top]}
            for one in tokens
        ]
        return {"content": content, "refusal": None}


class CompletionShape:
    """``text_completion``, whole or as a chunk."""

    def __init__(self, head: Head, *, logprobs: bool, include_usage: bool) -> None:
        self._head, self._logprobs = head, logprobs
        self._more: dict[str, Any] = {"usage": None} if include_usage else {}

    def whole(self, deltas: Sequence[Delta], usage: CompletionUsage) -> dict[str, Any]:
        """See ``Shape``."""
        choices = [self._choice(*joined) for joined in _joined(deltas)]
        return _object(self._head, "text_completion", deltas) | {
            "choices": choices,
            "usage": usage.model_dump(),
        }

    def chunks(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """See ``Shape``."""
        if delta.text or delta.logprobs or delta.finish_reason:
            choice = self._choice(delta.index, delta.text, delta.logprobs, delta.finish_reason)
            yield _object(self._head, "text_completion", (delta,)) | {"choices": [choice]} | self._more

    def usage(self, usage: CompletionUsage) -> dict[str, Any]:
        """See ``Shape``."""
        return _object(self._head, "text_completion", ()) | {"choices": [], "usage": usage.model_dump()}

    def _choice(
        self, index: int, text: str, tokens: Sequence[TokenLogprob], reason: str | None
    ) -> dict[str, Any]:
        logprobs = _legacy(tokens) if self._logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def error_response(error: errors.AnamorphError) -> JSONResponse:
    """An error as an answer of its own."""
    status, body = error_body(error)
    retry_after = getattr(error, "retry_after", None)
    headers = {"Retry-After": str(round(retry_after))} if retry_after is not None else None
    return JSONResponse(body, status, headers)


def error_body(error: errors.AnamorphError) -> tuple[int, dict[str, Any]]:
    """Status and body of an error."""
    if isinstance(error, errors.ServiceError):
        return problems.status_of(error), problems.openai_error(error)
    status = 502 if isinstance(error, _BAD_GATEWAY) else 500
    code = "bad_gateway" if status == 502 else "internal_error"
    return status, {"error": {"message": str(error), "type": "server_error", "param": None, "code": code}}


def _object(head: Head, kind: str, deltas: Sequence[Delta]) -> dict[str, Any]:
    return {
        "id": head.id,
        "object": kind,
        "created": head.created,
        "model": head.model,
        "system_fingerprint": deltas[0].key_id if deltas else None,
    }


def _joined(deltas: Sequence[Delta]) -> Iterator[tuple[int, str, list[TokenLogprob], str | None]]:
    """Each choice once: index, text, logprobs, finish reason."""
    for index in sorted({delta.index for delta in deltas}):
        own = [delta for delta in deltas if delta.index == index]
        tokens = [token for delta in own for token in delta.logprobs]
        yield index, "".join(delta.text for delta in own), tokens, own[-1].finish_reason


def _entry(token: Piece, logprob: float | None) -> dict[str, Any]:
    raw = None if token.raw is None else list(token.raw)
    return {"token": token.text, "bytes": raw, "logprob": logprob}


def _legacy(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Logprobs of a completion. ``text_offset`` counts characters from the start of the answer's text."""
    return {
        "tokens": [one.token.text for one in tokens],
        "token_logprobs": [one.logprob for one in tokens],
        "top_logprobs": [_first_wins(one.top) for one in tokens],
        "text_offset": [one.offset for one in tokens],
    }


def _first_wins(top: Sequence[tuple[Piece, float]]) -> dict[str, float]:
    # Two tokens may read the same; the likelier one comes first and keeps the name.
    out: dict[str, float] = {}
    for token, value in top:
        out.setdefault(token.text, value)
    return out
