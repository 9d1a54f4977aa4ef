"""Calls to an inference endpoint: whole and streamed completions, sync and async.

The answer's key id must be the one that was asked for, in the header and in every
chunk: a wrong key would give fluent nonsense, so it is an error and never an answer.

The caller owns the ``httpx`` client and with it timeouts and connection limits.
Leaving a stream early (closing the generator) closes the connection, which cancels
the generation on the server.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
from pydantic import ValidationError

from anamorph import errors
from anamorph.wire import problems
from anamorph.wire.inference import KEY_ID_HEADER, Completion

_DONE = "[DONE]"


def complete(
    http: httpx.Client,
    endpoint: str,
    request: Mapping[str, Any],
    *,
    token: str,
    key_id: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Completion:
    """One whole completion.

    Args:
        http: client with the caller's timeouts.
        endpoint: ``http://host:port/{tenant}/{model}/v{n}``.
        request: fields of ``inference.CompletionRequest``; ids are encrypted already.
        token: inference token.
        key_id: key id that the ids are encrypted under; ``None`` for the plaintext baseline.
        headers: further headers, such as trace context.

    Raises:
        ServiceError: the subclass of the answer's status; ``Unavailable`` if nothing answered.
        KeyMismatch: the answer comes from another key.
        StreamInterrupted: the answer lacks a choice or a finish reason.
    """
    body, call = _prepare(endpoint, request, token, key_id, headers, stream=False)
    with _unreachable():
        response = http.post(call.url, json=body, headers=call.headers)
    return call.whole(response)


async def acomplete(
    http: httpx.AsyncClient,
    endpoint: str,
    request: Mapping[str, Any],
    *,
    token: str,
    key_id: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Completion:
    """Asynchronous twin of :func:`complete`."""
    body, call = _prepare(endpoint, request, token, key_id, headers, stream=False)
    with _unreachable():
        response = await http.post(call.url, json=body, headers=call.headers)
    return call.whole(response)


def stream(
    http: httpx.Client,
    endpoint: str,
    request: Mapping[str, Any],
    *,
    token: str,
    key_id: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Generator[Completion]:
    """A streamed completion, chunk by chunk; arguments and errors as :func:`complete`.

    Raises:
        StreamInterrupted: the stream ended, broke or carried an error before every
            choice had its finish reason and the end mark was seen.
    """
    body, call = _prepare(endpoint, request, token, key_id, headers, stream=True)
    with _unreachable():
        sent = http.build_request("POST", call.url, json=body, headers=call.headers)
        response = http.send(sent, stream=True)
    try:
        if response.status_code >= 400:
            with _interrupted():
                response.read()
        call.check(response)
        with _interrupted():
            for line in response.iter_lines():
                chunk = call.feed(line)
                if chunk is not None:
                    yield chunk
        call.finish()
    finally:
        response.close()


async def astream(
    http: httpx.AsyncClient,
    endpoint: str,
    request: Mapping[str, Any],
    *,
    token: str,
    key_id: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> AsyncGenerator[Completion]:
    """Asynchronous twin of :func:`stream`; use it under ``contextlib.aclosing``."""
    body, call = _prepare(endpoint, request, token, key_id, headers, stream=True)
    with _unreachable():
        sent = http.build_request("POST", call.url, json=body, headers=call.headers)
        response = await http.send(sent, stream=True)
    try:
        if response.status_code >= 400:
            with _interrupted():
                await response.aread()
        call.check(response)
        with _interrupted():
            async for line in response.aiter_lines():
                chunk = call.feed(line)
                if chunk is not None:
                    yield chunk
        call.finish()
    finally:
        await response.aclose()


class _Call:
    """What both twins know about one request: where it goes, and when its answer is whole."""

    def __init__(self, url: str, headers: dict[str, str], key_id: str | None, choices: int) -> None:
        self.url = url
        self.headers = headers
        self._key_id = key_id
        self._choices = choices
        self._unfinished = set(range(choices))
        self._data: list[str] = []
        self._done = False

    def whole(self, response: httpx.Response) -> Completion:
        """The completion in a response that has been read."""
        self.check(response)
        completion = self._parse(response.content)
        if self._unfinished:
            raise errors.StreamInterrupted("the answer lacks a choice or a finish reason: it is incomplete")
        return completion

    def check(self, response: httpx.Response) -> None:
        """Raise for an error answer, and for an answer under another key."""
        status = response.status_code
        if status >= 400:
            body = _json(response)
            if not isinstance(body, dict) and (status >= 500 or status == 408):
                status = 503  # from a proxy in between: the engine itself answers in OpenAI's shape
            problems.raise_for(status, body, response.headers.get("Retry-After"))
        if response.headers.get(KEY_ID_HEADER) != self._key_id:
            raise errors.KeyMismatch("the answer carries another key id than the request: it is discarded")

    def feed(self, line: str) -> Completion | None:
        """Take one line of an event stream; return the chunk that it completes."""
        if line.startswith("data:"):
            self._data.append(line[5:].removeprefix(" "))
            return None
        if line or not self._data:  # comments and other fields; blank lines between events
            return None
        data, self._data = "\n".join(self._data), []
        if data == _DONE:
            self._done = True
            return None
        if self._done:
            raise errors.StreamInterrupted("the stream went on after its end mark")
        return self._parse(data)

    def finish(self) -> None:
        """The stream is over: raise unless it was complete."""
        if self._unfinished or not self._done:
            raise errors.StreamInterrupted("the stream ended before it was complete")

    def _parse(self, data: str | bytes) -> Completion:
        try:
            completion = Completion.model_validate_json(data)
        except ValidationError:
            # Not chained: a validation error quotes its input, which holds ids.
            raise _error_event(data) from None
        if self._key_id is not None and completion.system_fingerprint != self._key_id:
            raise errors.KeyMismatch("a chunk carries another key id than the request: it is discarded")
        for choice in completion.choices:
            if not 0 <= choice.index < self._choices:
                raise errors.StreamInterrupted("the answer holds a choice that was not asked for")
            if choice.finish_reason is not None:
                self._unfinished.discard(choice.index)
        return completion


def _prepare(
    endpoint: str,
    request: Mapping[str, Any],
    token: str,
    key_id: str | None,
    headers: Mapping[str, str] | None,
    *,
    stream: bool,
) -> tuple[dict[str, Any], _Call]:
    own = {"Authorization": f"Bearer {token}"} | ({KEY_ID_HEADER: key_id} if key_id is not None else {})
    prompt = request.get("prompt")
    batch = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], list) else 1
    call = _Call(
        f"{endpoint.rstrip('/')}/v1/completions",
        {**(headers or {}), **own},
        key_id,
        batch * int(request.get("n") or 1),
    )
    return {**request, "stream": stream}, call


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def _error_event(data: str | bytes) -> errors.AnamorphError:
    """An error that the server put into the stream, or a chunk that is not one of ours."""
    try:
        error = json.loads(data).get("error", {})
        message = str(error.get("message", "")) if isinstance(error, dict) else ""
    except (ValueError, AttributeError):
        message = ""
    if message:
        return errors.StreamInterrupted(f"the server broke off: {message}")
    return errors.StreamInterrupted("the answer is not a completion; is this an Anamorph endpoint?")


@contextmanager
def _unreachable() -> Iterator[None]:
    try:
        yield
    except httpx.TransportError as error:
        # The text of a transport error names hosts and phases, never content.
        raise errors.Unavailable(
            f"no answer from the inference endpoint: {type(error).__name__}", code="unreachable"
        ) from error


@contextmanager
def _interrupted() -> Iterator[None]:
    try:
        yield
    except httpx.TransportError as error:
        raise errors.StreamInterrupted(f"the connection broke: {type(error).__name__}") from error
