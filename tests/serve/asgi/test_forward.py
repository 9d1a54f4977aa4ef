"""A forwarded request answers as a direct one does, byte for byte, and is cancelled as one."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import pytest

from anamorph.errors import Unavailable
from anamorph.serve.api.app import build_app
from anamorph.serve.asgi.forward import REPORT_TOKENS, Begin, Forwarded, Served, respond
from anamorph.serve.engines.fake import FakeEngine, continuation

if TYPE_CHECKING:
    from tests.serve.conftest import Serve, Served as Endpoint  # noqa: I001

PROMPT = [11, 12, 13]


def forwarded(
    served: Endpoint, body: bytes, path: str = "/v1/completions", method: str = "POST"
) -> Forwarded:
    headers = tuple((n.lower().encode(), v.encode()) for n, v in served.headers().items())
    return Forwarded("acme", "smol", 1, method, path, headers, body)


def completion(**fields: Any) -> bytes:
    return json.dumps({"prompt": PROMPT, "max_tokens": 70, **fields}).encode()


async def pieces(served: Endpoint, request: Forwarded) -> list[Begin | Served | bytes]:
    async with aclosing(respond(build_app(served.endpoint), request)) as answer:
        return [piece async for piece in answer]


def body_of(answer: list[Begin | Served | bytes]) -> bytes:
    parts = [p.body if isinstance(p, Begin) else p for p in answer if not isinstance(p, Served)]
    return b"".join(parts)


def ids_of(stream: bytes) -> list[int]:
    events = [line.removeprefix(b"data: ") for line in stream.split(b"\n\n") if line]
    assert events[-1] == b"[DONE]"
    return [i for event in events[:-1] for i in json.loads(event)["choices"][0]["token_ids"]]


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_is_whole_and_in_order(served: Endpoint, stream: bool) -> None:
    """Begin comes first, the last report of tokens last, and between them every byte."""
    answer = await pieces(served, forwarded(served, completion(stream=stream, ignore_eos=True)))
    begin, last = answer[0], answer[-1]
    assert isinstance(begin, Begin)
    assert begin.status == 200
    assert isinstance(last, Served)
    assert last.last
    expected = continuation(served.endpoint.fingerprint, PROMPT, 70, 500)
    found = body_of(answer)
    ids = ids_of(found) if stream else json.loads(found)["choices"][0]["token_ids"]
    assert ids == expected


@pytest.mark.parametrize("stream", [True, False])
async def test_all_ids_are_reported_and_some_on_the_way(serve: Serve, stream: bool) -> None:
    """Prompt and answer, as the engine itself counts them; a long stream reports before its end."""
    served = serve(engine=FakeEngine("acme.smol.v1.0123456789abcdef", vocab_size=500, delay_s=0.0005))
    answer = await pieces(served, forwarded(served, completion(stream=stream, ignore_eos=True)))
    reports = [piece for piece in answer if isinstance(piece, Served)]
    assert sum(report.tokens for report in reports) == served.endpoint.admission.usage().tokens == 73
    assert [report.last for report in reports] == [False] * (len(reports) - 1) + [True]
    assert not stream or len(reports) >= 70 // (REPORT_TOKENS + 3)


async def test_refusals_pass_with_status_and_headers(served: Endpoint) -> None:
    """The engine's own checks run: another key is 409 there, whoever forwards."""
    request = forwarded(served, completion())
    wrong = tuple((n, v.replace(b".v1.", b".v2.")) for n, v in request.headers)
    [begin, last] = await pieces(
        served, Forwarded("acme", "smol", 1, "POST", "/v1/completions", wrong, request.body)
    )
    assert isinstance(begin, Begin)
    assert begin.status == 409
    assert json.loads(begin.body)["error"]["code"] == "wrong_key"
    assert last == Served(0, last=True)


async def test_closing_cancels_the_engines_work(serve: Serve) -> None:
    """Whoever hangs up frees the place in the engine, and no task is left."""
    served = serve(engine=FakeEngine("acme.smol.v1.0123456789abcdef", vocab_size=500, delay_s=0.01))
    answer = respond(build_app(served.endpoint), forwarded(served, completion(stream=True)))
    assert isinstance(await anext(answer), Begin)
    assert served.endpoint.admission.usage().in_flight == 1
    await answer.aclose()
    assert served.endpoint.admission.usage().in_flight == 0
    assert served.endpoint.engine.load().running == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_an_application_that_ends_early_is_an_error(served: Endpoint) -> None:
    """Nothing at all, or a body without its end: never a short answer that looks complete."""

    async def silent(scope: Any, receive: Any, send: Any) -> None:
        pass

    async def cut(scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG001
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})

    for app in (silent, cut):
        with pytest.raises(Unavailable):
            [piece async for piece in respond(app, forwarded(served, b""))]
