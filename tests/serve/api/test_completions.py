"""What a completion answers, whole and streamed, and what it refuses by name."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import pytest

from anamorph.errors import Unavailable
from anamorph.serve.engines.base import Sampling, Token
from anamorph.serve.engines.fake import FakeEngine, continuation
from anamorph.wire import completions as calls
from anamorph.wire.inference import KEY_ID_HEADER, Completion

if TYPE_CHECKING:
    from tests.serve.conftest import Serve, Served

KEY_ID = "acme.smol.v1.0123456789abcdef"
PROMPT = [11, 12, 13]


def expected(n: int, prompt: Sequence[int] = PROMPT) -> list[int]:
    return continuation(KEY_ID, prompt, n, 500)


async def streamed(served: Served, **fields: Any) -> list[Completion]:
    request = {"prompt": PROMPT, **fields}
    token = served.issuer.token(served.clock.now)
    async with aclosing(
        calls.astream(served.http, "http://engine", request, token=token, key_id=KEY_ID)
    ) as chunks:
        return [chunk async for chunk in chunks]


async def test_a_completion_is_the_engines_tokens_under_this_key(served: Served) -> None:
    """Ids in, ids out; the key id stands in header and fingerprint."""
    response = await served.complete(prompt=PROMPT, max_tokens=5)
    body = response.json()
    assert response.headers[KEY_ID_HEADER] == body["system_fingerprint"] == KEY_ID
    assert response.headers["cache-control"] == "no-store"
    assert body["choices"][0]["token_ids"] == expected(5)
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}


async def test_several_prompts_and_n_are_numbered_as_openai_does(served: Served) -> None:
    """Choice ``i * n + j`` is the j-th answer to prompt i."""
    prompts = [[1, 2], [3, 4]]
    body = (await served.complete(prompt=prompts, max_tokens=4, n=3)).json()
    assert [c["index"] for c in body["choices"]] == list(range(6))
    assert [c["token_ids"] for c in body["choices"]] == [expected(4, p) for p in prompts for _ in range(3)]
    assert body["usage"] == {"prompt_tokens": 4, "completion_tokens": 24, "total_tokens": 28}


async def test_stop_ids_end_a_sequence_and_are_reported(served: Served) -> None:
    """The stopping id is delivered; ``stop_reason`` names it when the request had asked for it."""
    third = expected(3)[2]
    body = (await served.complete(prompt=PROMPT, max_tokens=9, stop_token_ids=[third])).json()
    choice = body["choices"][0]
    cut = expected(9)[: expected(9).index(third) + 1]
    assert (choice["token_ids"], choice["finish_reason"], choice["stop_reason"]) == (cut, "stop", third)


async def test_the_models_end_of_text_stops_unless_ignored(serve: Serve) -> None:
    """``ignore_eos`` makes answers of a fixed length, as measurements need them."""
    second = expected(2)[1]
    served = serve(engine=FakeEngine(KEY_ID, vocab_size=500, eos_ids=frozenset({second})))
    stopped = (await served.complete(prompt=PROMPT, max_tokens=6)).json()["choices"][0]
    assert (len(stopped["token_ids"]), stopped["finish_reason"], stopped["stop_reason"]) == (2, "stop", None)
    whole = (await served.complete(prompt=PROMPT, max_tokens=6, ignore_eos=True)).json()["choices"][0]
    assert whole["token_ids"] == expected(6)


async def test_a_stream_says_the_same_as_a_whole_answer(served: Served) -> None:
    """Chunks put together are the answer; usage comes last and only if asked for."""
    chunks = await streamed(served, max_tokens=6, n=2, stream_options={"include_usage": True})
    for index in range(2):
        ids = [i for c in chunks for choice in c.choices if choice.index == index for i in choice.token_ids]
        assert ids == expected(6)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 15
    assert all(c.usage is None for c in await streamed(served, max_tokens=2))


async def test_prompt_ids_are_echoed_once_when_asked_for(served: Served) -> None:
    """As vLLM does: on the answer, or on a stream's first chunk of each choice."""
    body = (await served.complete(prompt=PROMPT, max_tokens=2, return_token_ids=True)).json()
    assert body["choices"][0]["prompt_token_ids"] == PROMPT
    chunks = await streamed(served, max_tokens=3, return_token_ids=True)
    assert [c.choices[0].prompt_token_ids for c in chunks] == [PROMPT, None, None]


async def test_logprobs_spell_tokens_as_ids(served: Served) -> None:
    """Tokens read ``token_id:N``; the chosen one is always among the likely ones, offsets add up."""
    body = (await served.complete(prompt=PROMPT, max_tokens=3, logprobs=2)).json()
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [f"token_id:{i}" for i in expected(3)]
    assert all(t in top for t, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))
    assert logprobs["text_offset"][2] == len("".join(logprobs["tokens"][:2]))


@pytest.mark.parametrize("prompt", ["plain text", ["plain text"], [[1, 2], "plain text"]])
async def test_text_is_refused_and_never_repeated(
    served: Served, prompt: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Plaintext is 422; neither the answer nor any log line holds a word of it."""
    with caplog.at_level(logging.DEBUG):
        response = await served.complete(prompt=prompt, max_tokens=2)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (422, "plaintext_refused", "prompt")
    assert error["message"] == "this endpoint takes encrypted token ids"
    assert "plain text" not in response.text + caplog.text


async def test_chat_is_refused_as_text(served: Served) -> None:
    """A chat request carries text by nature: it says so instead of 404."""
    body = {"messages": [{"role": "user", "content": "plain text"}]}
    response = await served.http.post("/v1/chat/completions", json=body, headers=served.headers())
    assert (response.status_code, response.json()["error"]["code"]) == (422, "plaintext_refused")


@pytest.mark.parametrize(
    "field", ["best_of", "echo", "suffix", "stop", "presence_penalty", "messages", "x" * 99]
)
async def test_an_unknown_field_is_named(served: Served, field: str) -> None:
    """Nothing is ignored: what is not supported is a 400 that names it."""
    response = await served.complete(prompt=PROMPT, **{field: 1})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "unknown_field", field[:64])


BAD: list[tuple[str, Any]] = [
    ("prompt", []),
    ("prompt", [[]]),
    ("prompt", [1, -1]),
    ("prompt", [500]),
    ("prompt", [2**70]),
    ("prompt", [1.5]),
    ("prompt", [True]),
    ("prompt", None),
    ("prompt", {"a": 1}),
    ("prompt", [1] * 201),
    ("max_tokens", 0),
    ("max_tokens", 198),
    ("max_tokens", "5"),
    ("temperature", -0.1),
    ("temperature", 2.5),
    ("top_p", 0),
    ("top_p", 1.5),
    ("top_k", -1),
    ("seed", 2**63),
    ("seed", 0.5),
    ("n", 0),
    ("n", 17),
    ("logprobs", 21),
    ("logprobs", True),
    ("logit_bias", {"500": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"01": 1}),
    ("logit_bias", {"²": 1}),
    ("logit_bias", {"secret": 1}),
    ("logit_bias", {"9" * 500: 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"1": "x"}),
    ("logit_bias", {str(i): 1 for i in range(1025)}),
    ("stop_token_ids", [500]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", list(range(65))),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("stream_options", {"more": 1}),
    ("user", "u" * 300),
]


@pytest.mark.parametrize(("field", "value"), BAD)
async def test_a_bad_value_is_refused_by_name_and_not_repeated(
    served: Served, field: str, value: Any
) -> None:
    """Every value is checked before it reaches the batch; the message holds none of it."""
    response = await served.complete(**{"prompt": PROMPT, field: value})
    error = response.json()["error"]
    assert response.status_code == 400, response.text
    assert str(error["param"]).split(".")[0] == field
    assert "secret" not in error["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"null", b'{"prompt": [1], "temperature": NaN}', b"[" * 10_000, b"\xff"]
)
async def test_a_body_that_is_no_json_object_is_refused(served: Served, body: bytes) -> None:
    """Also NaN and Infinity, which JSON does not know, and endless nesting."""
    response = await served.http.post("/v1/completions", content=body, headers=served.headers())
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_value")


async def test_another_models_name_is_refused(served: Served) -> None:
    """A request for another model is not answered by this one."""
    response = await served.complete(model="other", prompt=PROMPT)
    assert (response.status_code, response.json()["error"]["param"]) == (404, "model")
    assert (await served.complete(model="smol", prompt=PROMPT)).status_code == 200


async def test_the_queue_is_bounded(serve: Serve) -> None:
    """What does not fit gets 429 with Retry-After at once; what was let in is answered."""
    engine = FakeEngine(KEY_ID, vocab_size=500, delay_s=0.01)
    served = serve(engine=engine, max_concurrent=2, max_queued=2)
    answers = await asyncio.gather(*(served.complete(prompt=PROMPT, max_tokens=5) for _ in range(7)))
    codes = sorted(answer.status_code for answer in answers)
    assert codes == [200] * 4 + [429] * 3
    refused = next(a for a in answers if a.status_code == 429)
    assert (refused.json()["error"]["code"], refused.headers["retry-after"]) == ("overloaded", "1")
    assert (await served.complete(prompt=PROMPT)).status_code == 200


async def test_a_request_for_more_sequences_than_there_are_places_is_refused(serve: Serve) -> None:
    """It could never be let in, so it is a 400 and not a 429 to be retried for ever."""
    served = serve(max_concurrent=2, max_queued=0)
    response = await served.complete(prompt=PROMPT, n=3)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "n")


class Failing(FakeEngine):
    """Fails after two tokens, with words that must not get out."""

    async def submit(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Token, None]:
        async with aclosing(super().submit(prompt, sampling)) as tokens:
            yield await anext(tokens)
            yield await anext(tokens)
            raise RuntimeError(f"broke on {list(prompt)}")


async def test_a_failing_engine_is_an_error_and_says_nothing_of_the_request(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """500 for a whole answer, an error event and no end mark in a stream; no ids in either or in a log."""
    served = serve(engine=Failing(KEY_ID, vocab_size=500))
    response = await served.complete(prompt=PROMPT, max_tokens=9)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    stream = await served.complete(prompt=PROMPT, max_tokens=9, stream=True)
    events = [line for line in stream.text.splitlines() if line]
    assert json.loads(events[-1].removeprefix("data: "))["error"]["type"] == "server_error"
    assert "[DONE]" not in stream.text
    assert "[11, 12, 13]" not in response.text + stream.text + caplog.text


async def test_an_endless_answer_times_out(serve: Serve) -> None:
    """A request has its time, then 503; its place is free again."""
    engine = FakeEngine(KEY_ID, vocab_size=500, delay_s=3600)
    served = serve(engine=engine, request_timeout_s=0.05)
    response = await served.complete(prompt=PROMPT)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "timeout")
    assert (engine.load().running, served.endpoint.admission.usage().in_flight) == (0, 0)


async def disconnecting(served: Served, body: dict[str, Any], after: int) -> list[dict[str, Any]]:
    """Speak ASGI by hand: send the body, take ``after`` messages, hang up."""
    from anamorph.serve.api.app import build_app

    sent: list[Any] = []
    gone = asyncio.Event()
    incoming = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Any:
        if incoming:
            return incoming.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) >= after:
            gone.set()

    headers = [(k.lower().encode(), v.encode()) for k, v in served.headers().items()]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": headers,
        "query_string": b"",
    }
    if after == 0:
        asyncio.get_running_loop().call_later(0.02, gone.set)
    await asyncio.wait_for(build_app(served.endpoint)(scope, receive, send), 5)
    return sent


@pytest.mark.parametrize(("stream", "after"), [(False, 0), (True, 0), (True, 3)])
async def test_a_closed_connection_cancels_the_generation(serve: Serve, stream: bool, after: int) -> None:
    """Whole or streamed, before or after the first token: nobody computes for nobody."""
    engine = FakeEngine(KEY_ID, vocab_size=500, delay_s=0.01 if after else 3600)
    served = serve(engine=engine)
    body = {"prompt": PROMPT, "max_tokens": 190, "stream": stream}
    sent = await disconnecting(served, body, after)
    assert len(sent) < 20
    assert (engine.load().running, served.endpoint.admission.usage().in_flight) == (0, 0)


async def test_usage_counts_what_crossed_the_wire(served: Served) -> None:
    """Prompt and answer ids both feed an eavesdropper, so both count; refused requests do not."""
    await served.complete(prompt=PROMPT, max_tokens=5)
    await served.complete(prompt="text")
    usage = (await served.http.get("/usage", headers=served.headers(sub="operator"))).json()
    assert (usage["tokens"], usage["in_flight"]) == (8, 0)


async def test_health_follows_the_engine(served: Served) -> None:
    """An engine that has stopped computing is not healthy."""
    served.endpoint.engine.close()
    response = await served.http.get("/healthz")
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")


async def test_metrics_tell_what_was_served_but_no_ids(served: Served) -> None:
    """Prometheus text with OpenAI's names for tenants' requests, outcomes included."""
    await served.complete(prompt=PROMPT, max_tokens=5)
    text = (await served.http.get("/metrics")).text
    assert 'gen_ai_request_model="smol"' in text
    assert "anamorph_engine_sequences_running" in text
    labels = re.findall(r'="([^"]*)"', re.sub(r'\ble="[^"]*"', "", text))
    assert not {str(token) for token in [*PROMPT, *expected(5)]} & set(labels)


def test_the_fake_engines_answer_is_prefix_consistent() -> None:
    """As greedy decoding: the rest of an answer is the answer to prompt and first part."""
    whole = continuation(KEY_ID, PROMPT, 8, 500)
    assert continuation(KEY_ID, [*PROMPT, *whole[:3]], 5, 500) == whole[3:]
    assert continuation("acme.smol.v2.0123456789abcdef", PROMPT, 8, 500) != whole


async def test_an_engines_unavailability_is_a_503(serve: Serve) -> None:
    """Before the first token even a stream answers with a status, so that clients retry."""

    class Down(FakeEngine):
        async def submit(self, _: Sequence[int], __: Sampling) -> AsyncGenerator[Token, None]:
            raise Unavailable("stopped", retry_after=5)
            yield Token(0)

    served = serve(engine=Down(KEY_ID, vocab_size=500))
    for stream in (False, True):
        response = await served.complete(prompt=PROMPT, stream=stream)
        assert (response.status_code, response.headers["retry-after"]) == (503, "5")
