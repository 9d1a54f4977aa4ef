"""Several sequences of one request, generated side by side and merged as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from anamorph.errors import Unavailable
from anamorph.serve.engines.base import Engine, Sampling, Token

Job = tuple[Sequence[int], Sampling]
Indexed = tuple[int, Token]


async def generate(engine: Engine, jobs: Sequence[Job], timeout_s: float) -> AsyncGenerator[Indexed, None]:
    """Tokens of all jobs as they come, each with its job's number; closing cancels all.

    Raises:
        Unavailable: the engine failed, or the whole took longer than ``timeout_s``.
    """
    deadline = asyncio.get_running_loop().time() + timeout_s
    arrived: asyncio.Queue[Indexed | Exception] = asyncio.Queue()
    pumps = [asyncio.create_task(_pump(engine, job, i, arrived)) for i, job in enumerate(jobs)]
    unfinished = len(pumps)
    try:
        while unfinished:
            index, token = await _next(arrived, deadline)
            unfinished -= token.finish is not None
            yield index, token
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(engine: Engine, job: Job, index: int, into: asyncio.Queue[Indexed | Exception]) -> None:
    try:
        async with aclosing(engine.submit(*job)) as tokens:
            async for token in tokens:
                into.put_nowait((index, token))
    except Exception as error:  # noqa: BLE001 - handed to the consumer, who raises it
        into.put_nowait(error)


async def _next(arrived: asyncio.Queue[Indexed | Exception], deadline: float) -> Indexed:
    try:
        async with asyncio.timeout_at(deadline):
            item = await arrived.get()
    except TimeoutError:
        raise Unavailable("the answer took too long", code="timeout", retry_after=1) from None
    if isinstance(item, Exception):
        raise item
    return item
