"""What the operator asks of served applications: the probe of a replica, and usage.

Probes are independent random ids chosen at materialisation; nothing of them is logged.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime, timedelta

import httpx
from pydantic import ValidationError

from anamorph import errors
from anamorph.wire.admin import InferenceTokenRead
from anamorph.wire.completions import acomplete
from anamorph.wire.serving import REPLICA_REFUSED, Usage
from anamorph_operator.actions import Verify
from anamorph_operator.state import Check, Outcome, Ref

_log = logging.getLogger(__name__)
# A token is replaced this long before it expires.
_MARGIN = timedelta(seconds=120)
# Readings of usage under way.
_AT_ONCE = 16

FetchToken = Callable[[str, str], Awaitable[InferenceTokenRead]]


class Tokens:
    """Inference tokens of the operator, one per (tenant, model), renewed in time."""

    def __init__(self, fetch: FetchToken, now: Callable[[], datetime]) -> None:
        self._fetch = fetch
        self._now = now
        self._held: dict[tuple[str, str], InferenceTokenRead] = {}

    async def get(self, ref: Ref) -> str:
        """A token that is good for at least two minutes.

        Raises:
            ServiceError: the key service refuses or does not answer.
        """
        place = (ref.tenant, ref.model)
        held = self._held.get(place)
        if held is None or held.expires_at - _MARGIN <= self._now():
            held = self._held[place] = await self._fetch(*place)
        return held.token

    def drop(self, ref: Ref) -> None:
        """Forget a token that was refused."""
        self._held.pop((ref.tenant, ref.model), None)


class Prober:
    """Runs probes beside the loop, so that a slow engine never delays a revocation."""

    def __init__(self, http: httpx.AsyncClient, tokens: Tokens, now: Callable[[], datetime]) -> None:
        self._http = http
        self._tokens = tokens
        self._now = now
        self._checks: dict[Ref, Check] = {}
        self._tasks: dict[Ref, asyncio.Task[None]] = {}

    def observe(self) -> dict[Ref, Check]:
        """The latest check of each version."""
        return dict(self._checks)

    def start(self, verify: Verify) -> None:
        """Begin to check one version; a check that runs already goes on."""
        task = self._tasks.get(verify.ref)
        if task is not None and not task.done():
            return
        before = self._checks.get(verify.ref)
        attempts = before.attempts + 1 if before else 1
        self._checks[verify.ref] = Check(Outcome.RUNNING, attempts, self._now())
        self._tasks[verify.ref] = asyncio.create_task(self._run(verify, attempts))

    async def _run(self, verify: Verify, attempts: int) -> None:
        outcome = Outcome.UNREACHABLE
        try:
            outcome = await self._compare(verify)
        except errors.AnamorphError as error:
            _log.warning("probe of %s: %s", verify.ref.app, error)
        finally:
            self._checks[verify.ref] = Check(outcome, attempts, self._now())

    async def _compare(self, verify: Verify) -> Outcome:
        token = await self._tokens.get(verify.ref)
        for prompt, expected in zip(verify.probe.prompts, verify.probe.expected, strict=True):
            request = {
                "prompt": list(prompt),
                "max_tokens": len(expected),
                "temperature": 0.0,
                "ignore_eos": True,
            }
            try:
                answer = await acomplete(
                    self._http, verify.endpoint, request, token=token, key_id=verify.key_id
                )
            except (errors.KeyMismatch, errors.Conflict):
                return Outcome.DIFFERENT
            except errors.Unavailable as error:
                if error.code != REPLICA_REFUSED:
                    raise
                _log.warning("probe of %s: %s", verify.ref.app, error)
                return Outcome.REFUSED
            if answer.choices[0].token_ids != list(expected):
                return Outcome.DIFFERENT
        return Outcome.EQUAL

    async def usage(
        self, endpoint: str, refs: Iterable[Ref], timeout_s: float = 2, within_s: float = 4
    ) -> dict[Ref, Usage]:
        """Readings of the versions that answer; one that does not is left out.

        A few at a time: what the HTTP client does for each request grows with those that wait. In
        random order, so that those who do not answer never cost the same others their reading.

        Args:
            endpoint: ``http://host:port`` of Ray Serve.
            refs: versions to ask.
            timeout_s: longest wait for each.
            within_s: after so long no further version is asked.
        """
        places, now = asyncio.Semaphore(_AT_ONCE), asyncio.get_running_loop().time
        end = now() + within_s

        async def read(ref: Ref) -> Usage | None:
            async with places:
                return await self._reading(endpoint, ref, timeout_s) if now() < end else None

        asked = list(refs)
        random.shuffle(asked)
        answers = await asyncio.gather(*(read(ref) for ref in asked))
        return {ref: answer for ref, answer in zip(asked, answers, strict=True) if answer is not None}

    async def _reading(self, endpoint: str, ref: Ref, timeout_s: float) -> Usage | None:
        try:
            headers = {"Authorization": f"Bearer {await self._tokens.get(ref)}"}
            response = await self._http.get(
                f"{endpoint.rstrip('/')}{ref.route}/usage", headers=headers, timeout=timeout_s
            )
            if response.status_code == 401:
                self._tokens.drop(ref)
            return Usage.model_validate_json(response.content) if response.status_code == 200 else None
        except (errors.ServiceError, httpx.TransportError, ValidationError):
            return None

    async def close(self) -> None:
        """Cancel the checks that run."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
