"""``POST /v1/completions``: whole answers and event streams of token ids."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing
from itertools import accumulate
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from anamorph.errors import ServiceError, Unavailable
from anamorph.serve.api.endpoint import Endpoint
from anamorph.serve.api.generation import Indexed, generate
from anamorph.serve.api.requests import Call, parse
from anamorph.serve.asgi import forward
from anamorph.serve.asgi.answers import JSON
from anamorph.serve.asgi.connection import while_connected
from anamorph.serve.engines.base import Token
from anamorph.telemetry import RequestTimer
from anamorph.wire import problems
from anamorph.wire.inference import KEY_ID_HEADER, Choice, Completion, CompletionUsage, Logprobs


async def complete(endpoint: Endpoint, request: Request) -> Response:
    """Answer one request; refused ones never reach the engine."""
    call = parse(await request.body(), endpoint.limits, endpoint.fresh_seed())
    answer = Answer(endpoint, call, _new_id(endpoint))
    if call.request.stream:
        return await EventStream.begin(answer, request)
    async with AsyncExitStack() as stack:
        tokens = await answer.start(stack, request)
        whole = await while_connected(request.receive, answer.whole(tokens))
        if whole is None:
            raise ClientDisconnect
    return JSON(whole.model_dump(mode="json"), headers=answer.headers)


async def _first(tokens: AsyncIterator[Indexed]) -> Indexed:
    return await anext(tokens)


def _new_id(endpoint: Endpoint) -> str:
    return f"cmpl-{endpoint.fresh_seed():016x}"


class Answer:
    """One request being answered: from tokens to OpenAI's messages."""

    def __init__(self, endpoint: Endpoint, call: Call, completion_id: str) -> None:
        self.endpoint = endpoint
        self.call = call
        self._id = completion_id
        self._created = int(endpoint.clock())
        self._completion_tokens = 0
        self._scope: Scope = {}
        key_id = endpoint.settings.key_id
        self.headers = {} if key_id is None else {KEY_ID_HEADER: key_id}

    async def start(self, stack: AsyncExitStack, request: Request) -> AsyncIterator[Indexed]:
        """Take places in the queue and begin; leaving ``stack`` cancels and gives them back.

        Raises:
            TooManyRequests: the queue is full.
        """
        endpoint, call = self.endpoint, self.call
        stack.enter_context(endpoint.admission.admit(len(call.jobs)))
        timer = stack.enter_context(endpoint.observing(request, call.prompt_tokens))
        self._scope = request.scope
        self._count(call.prompt_tokens)
        tokens = generate(endpoint.engine, call.jobs, endpoint.settings.request_timeout_s)
        return self._counted(await stack.enter_async_context(aclosing(tokens)), timer)

    async def _counted(
        self, tokens: AsyncGenerator[Indexed, None], timer: RequestTimer
    ) -> AsyncIterator[Indexed]:
        async for indexed in tokens:
            if indexed[1].began is not None:
                timer.computing(indexed[1].began)
            timer.token()
            self._completion_tokens += 1
            self._count(1)
            yield indexed

    def _count(self, ids: int) -> None:
        self.endpoint.admission.count(ids)
        forward.count(self._scope, ids)

    async def whole(self, tokens: AsyncIterator[Indexed]) -> Completion:
        """Collect everything into one message."""
        collected: list[list[Token]] = [[] for _ in self.call.jobs]
        async for index, token in tokens:
            collected[index].append(token)
        choices = [self.choice(i, sequence, first=True) for i, sequence in enumerate(collected)]
        return self.message(choices, self.usage())

    def choice(self, index: int, tokens: list[Token], *, first: bool) -> Choice:
        """One choice, or what is new of it; ``first`` for its first (or only) message."""
        prompt, sampling = self.call.jobs[index]
        last = tokens[-1]
        stopped = last.finish == "stop" and last.id in sampling.stop_ids
        return Choice(
            index=index,
            token_ids=[token.id for token in tokens],
            prompt_token_ids=list(prompt) if first and self.call.request.return_token_ids else None,
            logprobs=_logprobs(tokens) if sampling.logprobs is not None else None,
            finish_reason=last.finish,
            stop_reason=last.id if stopped else None,
        )

    def message(self, choices: list[Choice], usage: CompletionUsage | None) -> Completion:
        return Completion(
            id=self._id,
            created=self._created,
            model=self.endpoint.settings.model,
            system_fingerprint=self.endpoint.fingerprint,
            choices=choices,
            usage=usage,
        )

    def usage(self) -> CompletionUsage:
        """Tokens so far."""
        prompt, completion = self.call.prompt_tokens, self._completion_tokens
        return CompletionUsage(
            prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
        )


def _logprobs(tokens: list[Token]) -> Logprobs:
    # text_offset counts characters of the spelled-out tokens, as the field's name promises.
    names = [_name(token.id) for token in tokens]
    return Logprobs(
        tokens=names,
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[_top(token) for token in tokens],
        text_offset=[0, *accumulate(len(name) for name in names[:-1])],
    )


def _name(token_id: int) -> str:
    return f"token_id:{token_id}"


def _top(token: Token) -> dict[str, float]:
    top = {_name(token_id): value for token_id, value in token.top}
    if top and token.logprob is not None:
        top[_name(token.id)] = token.logprob  # OpenAI adds the chosen token where it is not among them
    return top


class EventStream(Response):
    """Server-sent events; one chunk per token, then usage if asked for, then ``[DONE]``.

    The first token is awaited before anything is sent, so that an error until then
    has its own status. A later one becomes an error event and the stream ends without
    ``[DONE]``.
    """

    media_type = "text/event-stream"

    def __init__(
        self, answer: Answer, stack: AsyncExitStack, first: Indexed, rest: AsyncIterator[Indexed]
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", **answer.headers})
        del self.headers["content-length"]  # not known
        self._answer = answer
        self._stack = stack
        self._first = first
        self._rest = rest
        self._failure: Exception | None = None

    @classmethod
    async def begin(cls, answer: Answer, request: Request) -> EventStream:
        """Start generating and wait for the first token.

        Raises:
            ServiceError: refused or failed before there was one.
        """
        async with AsyncExitStack() as stack:
            tokens = await answer.start(stack, request)
            first = await while_connected(request.receive, _first(tokens))
            if first is None:
                raise ClientDisconnect
            return cls(answer, stack.pop_all(), first, tokens)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        async with self._stack:
            if not await while_connected(receive, self._send(send)):
                raise ClientDisconnect
            if self._failure is not None:
                raise self._failure  # the client knows by now; log and metrics do not

    async def _send(self, send: Send) -> bool:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._events()) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return True

    async def _events(self) -> AsyncGenerator[bytes, None]:
        begun = {self._first[0]}
        try:
            yield self._chunk(*self._first, first=True)
            async for index, token in self._rest:
                yield self._chunk(index, token, first=index not in begun)
                begun.add(index)
        except Exception as error:  # noqa: BLE001 - the status is sent: all that is left is an event
            self._failure = error
            shown = error if isinstance(error, ServiceError) else Unavailable("the engine failed")
            yield _event(problems.openai_error(shown))
            return
        options = self._answer.call.request.stream_options
        if options is not None and options.include_usage:
            yield _event(self._answer.message([], self._answer.usage()).model_dump(mode="json"))
        yield b"data: [DONE]\n\n"

    def _chunk(self, index: int, token: Token, *, first: bool) -> bytes:
        choice = self._answer.choice(index, [token], first=first)
        return _event(self._answer.message([choice], None).model_dump(mode="json"))


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"
