"""Calls to an inference endpoint, against servers that answer what no engine of ours would."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from anamorph import errors
from anamorph.wire import completions
from anamorph.wire.inference import KEY_ID_HEADER, Completion

KEY_ID = "acme.chat.v1.0123456789abcdef"
OTHER = "acme.chat.v2.0123456789abcdef"
Handler = Callable[[httpx.Request], httpx.Response]


def chunk(
    *tokens: int, reason: str | None = None, index: int = 0, key_id: str = KEY_ID, **more: Any
) -> dict[str, Any]:
    choice = {"index": index, "token_ids": list(tokens), "finish_reason": reason}
    head = {"id": "x", "created": 1, "model": "chat", "system_fingerprint": key_id}
    return {**head, "choices": [choice], **more}


def events(*chunks: dict[str, Any] | str) -> str:
    return "".join(f"data: {one if isinstance(one, str) else json.dumps(one)}\n\n" for one in chunks)


def answering(
    body: str | dict[str, Any], status: int = 200, key_id: str | None = KEY_ID, **headers: str
) -> Handler:
    named = headers | ({KEY_ID_HEADER: key_id} if key_id else {})
    content = body if isinstance(body, str) else json.dumps(body)
    return lambda _: httpx.Response(status, content=content, headers=named)


def call(handler: Handler, key_id: str | None = KEY_ID, **request: Any) -> Completion:
    with httpx.Client(transport=httpx.MockTransport(handler)) as http:
        body = {"prompt": [1], **request}
        return completions.complete(http, "http://engine/a/", body, token="t", key_id=key_id)


def streamed(handler: Handler, key_id: str | None = KEY_ID, **request: Any) -> list[Completion]:
    with httpx.Client(transport=httpx.MockTransport(handler)) as http:
        body = {"prompt": [1], **request}
        return list(completions.stream(http, "http://engine/a", body, token="t", key_id=key_id))


async def astreamed(handler: Handler, key_id: str | None = KEY_ID, **request: Any) -> list[Completion]:
    async with httpx.AsyncClient(transport=httpx.MockTransport(handler)) as http:
        body = {"prompt": [1], **request}
        chunks = completions.astream(http, "http://engine/a", body, token="t", key_id=key_id)
        return [one async for one in chunks]


GOOD = events(chunk(5), chunk(6, reason="stop"), "[DONE]")
BROKEN = {
    "no end mark": events(chunk(5), chunk(6, reason="stop")),
    "no finish reason": events(chunk(5), "[DONE]"),
    "nothing": "",
    "an error": events(chunk(5), {"error": {"message": "the engine failed"}}),
    "more after the end": events(chunk(6, reason="stop"), "[DONE]", chunk(7)),
    "no completion": events('{"surprise": 1}', "[DONE]"),
    "no JSON": events("hello", "[DONE]"),
    "a choice nobody asked for": events(chunk(6, index=1, reason="stop"), "[DONE]"),
}


def test_what_is_sent() -> None:
    """The request goes to the endpoint's completions with token, key id and caller's headers."""
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return answering(chunk(5, reason="length"))(request)

    call(handler, max_tokens=3)
    assert str(seen[0].url) == "http://engine/a/v1/completions"
    assert (seen[0].headers["Authorization"], seen[0].headers[KEY_ID_HEADER]) == ("Bearer t", KEY_ID)
    assert json.loads(seen[0].content) == {"prompt": [1], "max_tokens": 3, "stream": False}


def test_a_stream_is_its_chunks() -> None:
    """Comments, other fields and several data lines per event are read as the standard says."""
    body = json.dumps(chunk(5)).replace(", ", ",\ndata:", 1)
    text = f": hi\n\nevent: x\ndata: {body}\n\n" + events(chunk(6, reason="stop"), "[DONE]")
    assert [one.choices[0].token_ids for one in streamed(answering(text))] == [[5], [6]]


async def test_the_twins_read_the_same() -> None:
    """The asynchronous stream gives the chunks of the synchronous one."""
    assert await astreamed(answering(GOOD)) == streamed(answering(GOOD))


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
async def test_an_incomplete_stream_is_an_error(text: str) -> None:
    """A stream that breaks off, in whatever way, never passes for an answer."""
    with pytest.raises(errors.StreamInterrupted):
        streamed(answering(text))
    with pytest.raises(errors.StreamInterrupted):
        await astreamed(answering(text))


def test_every_choice_must_finish() -> None:
    """With two prompts and n=2, four choices are waited for."""
    ends = [chunk(5, index=index, reason="stop") for index in range(4)]
    assert len(streamed(answering(events(*ends, "[DONE]")), prompt=[[1], [2]], n=2)) == 4
    with pytest.raises(errors.StreamInterrupted):
        streamed(answering(events(*ends[:3], "[DONE]")), prompt=[[1], [2]], n=2)


def test_a_whole_answer_without_finish_reason_is_an_error() -> None:
    """The same for answers that are not streamed."""
    with pytest.raises(errors.StreamInterrupted):
        call(answering(chunk(5)))


@pytest.mark.parametrize(("asked", "answered"), [(KEY_ID, OTHER), (KEY_ID, None), (None, KEY_ID)])
def test_an_answer_under_another_key_is_an_error(asked: str | None, answered: str | None) -> None:
    """Header missing, foreign or unexpected: the answer is discarded."""
    handler = answering(chunk(5, reason="stop"), key_id=answered)
    with pytest.raises(errors.KeyMismatch):
        call(handler, key_id=asked)


def test_a_chunk_under_another_key_is_an_error() -> None:
    """Each chunk says its key, and a stream cannot change it on the way."""
    text = events(chunk(5), chunk(6, reason="stop", key_id=OTHER), "[DONE]")
    with pytest.raises(errors.KeyMismatch):
        streamed(answering(text))


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, errors.BadRequest), (409, errors.Conflict), (410, errors.Gone), (422, errors.Unprocessable)],
)
async def test_an_error_answer_is_its_exception(status: int, kind: type[errors.ServiceError]) -> None:
    """Status, code and field of an error answer come out as the exception's."""
    body = {"error": {"message": "no", "code": "some_code", "param": "prompt"}}
    with pytest.raises(kind) as caught:
        call(answering(body, status))
    assert (caught.value.code, caught.value.param) == ("some_code", "prompt")
    for attempt in (lambda: streamed(answering(body, status)), None):
        with pytest.raises(kind):
            attempt() if attempt else await astreamed(answering(body, status))


def test_retry_after_is_kept() -> None:
    """The server's wish for patience reaches the caller."""
    body = {"error": {"message": "full", "code": "overloaded"}}
    with pytest.raises(errors.TooManyRequests) as caught:
        call(answering(body, 429, **{"Retry-After": "7"}))
    assert caught.value.retry_after == 7


@pytest.mark.parametrize("status", [408, 500, 502, 503, 504])
def test_a_proxy_that_cannot_reach_the_engine_is_unavailable(status: int) -> None:
    """Errors of something in between, in no shape of ours, say that a retry makes sense."""
    with pytest.raises(errors.Unavailable):
        call(answering("Internal Server Error", status, key_id=None))


def test_the_engines_own_failure_is_not_retryable() -> None:
    """A 500 in OpenAI's shape is an answer of the engine and stays one."""
    with pytest.raises(errors.ServiceError) as caught:
        call(answering({"error": {"message": "bug", "code": "internal_error"}}, 500))
    assert type(caught.value) is errors.ServiceError


def test_nobody_there_is_unavailable() -> None:
    """A refused connection is an error of ours, for streams too."""

    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    for attempt in (call, streamed):
        with pytest.raises(errors.Unavailable) as caught:
            attempt(refuse)
        assert caught.value.code == "unreachable"


def test_errors_do_not_quote_ids() -> None:
    """A malformed answer is not repeated in the exception or its cause."""
    with pytest.raises(errors.StreamInterrupted) as caught:
        streamed(answering(events({"choices": [{"token_ids": [31337]}]}, "[DONE]")))
    shown = f"{caught.value!r} {caught.value.__cause__!r}"
    assert "31337" not in shown
