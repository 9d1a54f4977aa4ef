"""What the proxy's callers wait for, as metrics: the conventions' ``gen_ai.client.*``."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from anamorph.client.proxy.answers import Delta
from anamorph.errors import AnamorphError
from anamorph.telemetry import OK, InferenceMetrics
from anamorph.wire.inference import CompletionUsage

Events = AsyncGenerator[Delta | CompletionUsage]


async def timed(events: Events, metrics: InferenceMetrics) -> Events:
    """The same events; the request is recorded when they end, fail, or are no longer wanted."""
    timer, outcome, usage = metrics.start(), "cancelled", None
    try:
        async with aclosing(events):
            async for one in events:
                if isinstance(one, Delta):
                    timer.token()  # upstream sends a chunk for each token of each choice
                else:
                    usage = one
                yield one
        outcome = OK
    except AnamorphError as error:
        outcome = type(error).__name__
        raise
    finally:
        timer.finish(outcome, input_tokens=usage.prompt_tokens if usage else None)
