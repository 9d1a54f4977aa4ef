"""Sync and async clients of one tenant's model: plain ids in, plain ids out."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import aclosing, closing
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx

from anamorph.client.exchange import Options, Prompt, decrypt_completion
from anamorph.client.keycache import After, Cancel, Lease
from anamorph.client.session import Alone, Ask, Pause, Plan, Send, Session, Step, waited
from anamorph.errors import AnamorphError
from anamorph.telemetry import traces
from anamorph.wire import completions, trust
from anamorph.wire.inference import Completion
from anamorph.wire.keyservice import AsyncKeyService, KeyService

T = TypeVar("T")

# Reading may take as long as the longest request; everything else is a matter of seconds.
TIMEOUT = httpx.Timeout(connect=5, read=300, write=30, pool=60)
# The key service answers within seconds, or says that it cannot.
KEYSVC_TIMEOUT = httpx.Timeout(10, connect=3)
LIMITS = httpx.Limits(max_connections=512, max_keepalive_connections=64)
_STREAM = {"stream_options": {"include_usage": True}}


class Client:
    """A model in its tenant's coordinates, used with plain token ids.

    It fetches the ACTIVE key version and an inference token, holds both no longer
    than the key service allows, moves to the new version when the endpoint says that
    the key has changed, and repeats what may be repeated.

    Args:
        keysvc_url: base URL of the key service.
        api_key: tenant API key; it goes to the key service only.
        tenant, model: whose model to use.
        retry_for: seconds over which a request is repeated after 429, 503 or a broken connection.
        timeout: of calls to the inference endpoint.
        clock, sleep, after, jitter: time and chance, for tests.
    """

    def __init__(
        self,
        keysvc_url: str,
        api_key: str,
        tenant: str,
        model: str,
        *,
        retry_for: float = 60.0,
        timeout: httpx.Timeout = TIMEOUT,
        transport: httpx.BaseTransport | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        after: After | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._keys = KeyService(keysvc_url, api_key, timeout=KEYSVC_TIMEOUT)
        self._http = httpx.Client(
            timeout=timeout, limits=LIMITS, transport=transport, trust_env=False, verify=trust.context()
        )
        self._session = Session(
            tenant, model, clock=clock, after=after or _thread_timer, jitter=jitter, retry_for=retry_for
        )
        self._sleep = sleep
        self._lock = threading.Lock()

    def lease(self) -> Lease:
        """The key version in use now: codec, endpoint and model record."""
        return self._run(self._session.lease(), stream=False)

    def complete(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """Complete ``prompt``, plain ids or several lists of them; all ids of the answer are plain.

        Raises:
            ServiceError: the subclass of the answer's status.
            KeyMismatch: the answer comes from another key; it is discarded.
            StreamInterrupted: the answer is incomplete.
        """
        answer, lease = self._run(self._session.request(prompt, options), stream=False)
        return decrypt_completion(lease.codec, answer)

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Generator[Completion]:
        """As :meth:`complete`, chunk by chunk; the last chunk carries usage and no choices.

        Closing the iterator cancels the generation. Nothing is repeated once the
        first chunk is there.
        """
        chunks, lease = self._run(self._session.request(prompt, options), stream=True)
        with closing(chunks):
            for chunk in chunks:
                yield decrypt_completion(lease.codec, chunk)

    def close(self) -> None:
        """Forget the key and close the connections."""
        self._session.close()
        self._keys.close()
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, plan: Plan[T], *, stream: bool) -> T:
        advance, value = plan.send, None
        while True:
            try:
                step = advance(value)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            try:
                advance, value = plan.send, self._perform(step, stream)
            except AnamorphError as error:
                advance, value = plan.throw, error

    def _perform(self, step: Step, stream: bool) -> Any:
        match step:
            case Ask(call):
                return call(self._keys)
            case Pause(seconds):
                return self._sleep(seconds)
            case Alone(plan, within):
                if not self._lock.acquire(timeout=within):
                    raise waited()
                try:
                    return self._run(plan, stream=stream)
                finally:
                    self._lock.release()
            case Send():
                return self._open(step) if stream else self._call(step)

    def _call(self, step: Send) -> Completion:
        lease, headers = step.lease, _trace()
        return completions.complete(
            self._http, lease.endpoint, step.request, token=step.token, key_id=lease.key_id, headers=headers
        )

    def _open(self, step: Send) -> Generator[Completion]:
        """The stream with its first chunk read, so that an early error can still be repaired."""
        lease, request = step.lease, step.request | _STREAM
        chunks = completions.stream(
            self._http, lease.endpoint, request, token=step.token, key_id=lease.key_id, headers=_trace()
        )
        return _chain(next(chunks), chunks)


class AsyncClient:
    """Asynchronous twin of :class:`Client`, for use within one event loop."""

    def __init__(
        self,
        keysvc_url: str,
        api_key: str,
        tenant: str,
        model: str,
        *,
        retry_for: float = 60.0,
        timeout: httpx.Timeout = TIMEOUT,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        after: After | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._keys = AsyncKeyService(keysvc_url, api_key, timeout=KEYSVC_TIMEOUT)
        self._http = httpx.AsyncClient(
            timeout=timeout, limits=LIMITS, transport=transport, trust_env=False, verify=trust.context()
        )
        self._session = Session(
            tenant, model, clock=clock, after=after or _loop_timer, jitter=jitter, retry_for=retry_for
        )
        self._sleep = sleep
        self._lock = asyncio.Lock()

    async def lease(self) -> Lease:
        """The key version in use now: codec, endpoint and model record."""
        return await self._run(self._session.lease(), stream=False)

    async def complete(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """Asynchronous twin of :meth:`Client.complete`."""
        answer, lease = await self._run(self._session.request(prompt, options), stream=False)
        return decrypt_completion(lease.codec, answer)

    async def stream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncGenerator[Completion]:
        """Asynchronous twin of :meth:`Client.stream`; use it under ``contextlib.aclosing``."""
        chunks, lease = await self._run(self._session.request(prompt, options), stream=True)
        async with aclosing(chunks):
            async for chunk in chunks:
                yield decrypt_completion(lease.codec, chunk)

    async def close(self) -> None:
        """Forget the key and close the connections."""
        self._session.close()
        await self._keys.close()
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, plan: Plan[T], *, stream: bool) -> T:
        advance, value = plan.send, None
        while True:
            try:
                step = advance(value)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            try:
                advance, value = plan.send, await self._perform(step, stream)
            except AnamorphError as error:
                advance, value = plan.throw, error

    async def _perform(self, step: Step, stream: bool) -> Any:
        match step:
            case Ask(call):
                return await call(self._keys)
            case Pause(seconds):
                return await self._sleep(seconds)
            case Alone(plan, within):
                try:
                    async with asyncio.timeout(within):
                        await self._lock.acquire()
                except TimeoutError:
                    raise waited() from None
                try:
                    return await self._run(plan, stream=stream)
                finally:
                    self._lock.release()
            case Send():
                return await (self._open(step) if stream else self._call(step))

    async def _call(self, step: Send) -> Completion:
        lease, headers = step.lease, _trace()
        return await completions.acomplete(
            self._http, lease.endpoint, step.request, token=step.token, key_id=lease.key_id, headers=headers
        )

    async def _open(self, step: Send) -> AsyncGenerator[Completion]:
        lease, request = step.lease, step.request | _STREAM
        chunks = completions.astream(
            self._http, lease.endpoint, request, token=step.token, key_id=lease.key_id, headers=_trace()
        )
        return _achain(await anext(chunks), chunks)


def _chain(first: Completion, rest: Generator[Completion]) -> Generator[Completion]:
    with closing(rest):
        yield first
        yield from rest


async def _achain(first: Completion, rest: AsyncGenerator[Completion]) -> AsyncGenerator[Completion]:
    async with aclosing(rest):
        yield first
        async for chunk in rest:
            yield chunk


def _trace() -> dict[str, str]:
    headers: dict[str, str] = {}
    traces.inject(headers)
    return headers


def _thread_timer(seconds: float, do: Callable[[], None]) -> Cancel:
    timer = threading.Timer(seconds, do)
    timer.daemon = True
    timer.start()
    return timer.cancel


def _loop_timer(seconds: float, do: Callable[[], None]) -> Cancel:
    return asyncio.get_running_loop().call_later(seconds, do).cancel
