"""OpenAI's own client against the proxy: what its users do, on a fake engine and on a real model.

Every promise here holds for any engine that answers greedily at temperature 0.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import openai
import pytest

if TYPE_CHECKING:
    from tests.client.conftest import System

QUESTION = "What is the capital of France?"


def messages(text: str = QUESTION) -> Any:
    return [{"role": "user", "content": text}]


def ask(system: System, text: str = QUESTION, **options: Any) -> Any:
    """A chat at temperature 0."""
    settings = {"max_tokens": 24, "temperature": 0, **options}
    return system.openai().chat.completions.create(model=system.model, messages=messages(text), **settings)


def complete(system: System, prompt: Any, **options: Any) -> Any:
    """A completion at temperature 0."""
    settings = {"max_tokens": 24, "temperature": 0, **options}
    return system.openai().completions.create(model=system.model, prompt=prompt, **settings)


def joined(chunks: Iterable[Any]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def test_chat(system: System) -> None:
    """A chat has an answer, a finish reason, its usage and the key id as fingerprint."""
    answer = ask(system)
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in {"stop", "length"}
    assert answer.usage.prompt_tokens == len(system.tokenizer.encode_chat(messages()))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.system_fingerprint.startswith(f"acme.{system.model}.v")


def test_streamed_chat(system: System) -> None:
    """A stream begins with the role, says what the whole answer says, ends with reason and usage."""
    chunks = list(ask(system, stream=True, stream_options={"include_usage": True}))
    whole = ask(system)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert joined(chunks) == whole.choices[0].message.content
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == [whole.choices[0].finish_reason]
    assert chunks[-1].usage == whole.usage


def test_completions(system: System) -> None:
    """A completion goes on with the prompt's text, streamed or not."""
    whole = complete(system, "The capital of France is")
    chunks = complete(system, "The capital of France is", stream=True)
    assert whole.choices[0].text
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_every_kind_of_prompt(system: System) -> None:
    """Text, texts, ids and lists of ids mean the same."""
    texts = ["The capital of France is", "def add(a, b):"]
    ids = [system.tokenizer.encode(text) for text in texts]
    expected = [complete(system, text).choices[0].text for text in texts]
    assert complete(system, ids[0]).choices[0].text == expected[0]
    for several in (texts, ids):
        answer = complete(system, several)
        assert [choice.text for choice in answer.choices] == expected
        assert answer.usage.prompt_tokens == sum(map(len, ids))


def test_two_choices(system: System) -> None:
    """``n=2`` gives two choices, each with its index, in streams too."""
    assert [choice.index for choice in ask(system, n=2, temperature=1, seed=7).choices] == [0, 1]
    seen: dict[int, str] = {0: "", 1: ""}
    for chunk in ask(system, n=2, stream=True):
        for choice in chunk.choices:
            seen[choice.index] += choice.delta.content or ""
    assert seen[0] == seen[1] == ask(system).choices[0].message.content


def test_stop_strings(system: System) -> None:
    """The answer ends before the stop string, which may lie across tokens and chunks."""
    full = ask(system).choices[0].message.content
    stop = full[3:8]
    for options in ({"stop": stop}, {"stop": ["\0never", stop]}):
        answer = ask(system, **options)
        assert answer.choices[0].message.content == full[: full.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
        assert joined(ask(system, stream=True, **options)) == full[: full.index(stop)]


def test_a_stop_string_ends_the_generation(system: System) -> None:
    """What would come after a stop string is not computed on."""
    full = ask(system).choices[0].message.content
    ask(system, stop=full[:2], max_tokens=2000)
    system.wait_until(lambda: system.in_flight() == 0)


def test_chat_logprobs(system: System) -> None:
    """Each token comes with its logprob and rivals, and the tokens' bytes make the text."""
    choice = ask(system, logprobs=True, top_logprobs=3).choices[0]
    raw = bytes(byte for entry in choice.logprobs.content for byte in entry.bytes or [])
    assert raw.decode(errors="replace") == choice.message.content
    assert all(entry.logprob <= 0 for entry in choice.logprobs.content)
    assert all(len(entry.top_logprobs) >= 3 for entry in choice.logprobs.content)
    assert choice.logprobs.content[0].token in {one.token for one in choice.logprobs.content[0].top_logprobs}


def test_streamed_logprobs(system: System) -> None:
    """A stream brings the logprobs of the whole answer, token by token."""
    whole = ask(system, logprobs=True).choices[0].logprobs.content
    chunks = list(ask(system, logprobs=True, stream=True))
    streamed = [
        entry for chunk in chunks for one in chunk.choices if one.logprobs for entry in one.logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in whole]


def test_completion_logprobs(system: System) -> None:
    """The older shape: tokens, logprobs, rivals and where in the text each token starts."""
    choice = complete(system, "The capital of France is", logprobs=2).choices[0]
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset)
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        if token.isprintable() and token.isascii() and not token.startswith(("bytes:", "<|")):
            assert choice.text[offset:].startswith(token)


def test_seed(system: System) -> None:
    """The same seed gives the same sample."""
    options: Any = {"temperature": 1.0, "seed": 1234}
    texts = {ask(system, **options).choices[0].message.content for _ in range(2)}
    assert len(texts) == 1


@pytest.mark.parametrize(
    "text",
    [
        "Wie heißt die Hauptstadt von Österreich?",
        "你好！请介绍一下北京。",
        "👋🌍 اكتب جملة",
        "👩‍👩‍👧 e\u0301 नमस्ते",
    ],
)
def test_other_scripts_and_emoji(system: System, text: str) -> None:
    """Text of any script goes in whole and comes out whole, streamed as at once."""
    answer = ask(system, text)
    assert answer.usage.prompt_tokens == len(system.tokenizer.encode_chat(messages(text)))
    assert joined(ask(system, text, stream=True)) == answer.choices[0].message.content


def test_a_long_prompt(system: System) -> None:
    """A prompt of 2,000 tokens is answered."""
    text = "The capital of France is Paris, and the capital of Italy is Rome. " * 500
    prompt = system.tokenizer.encode(text)[:2000]
    answer = complete(system, prompt, max_tokens=4)
    assert answer.usage.prompt_tokens == 2000
    assert answer.usage.completion_tokens >= 1


async def test_sixteen_streams(system: System) -> None:
    """Sixteen streams at once say what each of them says alone."""
    client = system.aopenai()

    async def one(index: int) -> str:
        stream = await client.chat.completions.create(
            model=system.model,
            messages=messages(f"Question {index}"),
            stream=True,
            max_tokens=12,
            temperature=0,
        )
        return "".join([choice.delta.content or "" async for chunk in stream for choice in chunk.choices])

    together = await asyncio.gather(*(one(index) for index in range(16)))
    alone = [await one(index) for index in (0, 7, 15)]
    await client.close()
    assert [together[0], together[7], together[15]] == alone


def test_a_cancelled_stream(system: System) -> None:
    """A caller that leaves a stream ends the generation in the engine."""
    stream = ask(system, stream=True, max_tokens=1500)
    for _, _chunk in zip(range(3), stream, strict=False):
        pass
    assert system.in_flight() == 1
    stream.close()
    system.wait_until(lambda: system.in_flight() == 0)


def test_a_caller_that_gives_up_waiting(system: System) -> None:
    """A caller that leaves before a whole answer is there ends the generation too."""
    client = system.openai(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model=system.model, messages=messages(), max_tokens=2000)
    system.wait_until(lambda: system.in_flight() == 0)


def test_max_completion_tokens(system: System) -> None:
    """Both names of the limit limit."""
    for name in ("max_tokens", "max_completion_tokens"):
        limit: Any = {name: 3}
        chat = system.openai().chat.completions
        answer = chat.create(model=system.model, messages=messages(), temperature=0, **limit)
        assert answer.usage.completion_tokens == 3


def test_logit_bias(system: System) -> None:
    """A bias acts on the tenant's own token, not on the one that has its number upstream."""
    token = system.tokenizer.encode("Paris")[0]
    try:
        answer = complete(system, "x", logit_bias={str(token): 100}, max_tokens=1)
    except openai.APIStatusError as error:
        pytest.fail(f"refused: {error.status_code}")
    assert answer.usage.completion_tokens == 1


def test_models(system: System) -> None:
    """The models are listed, and each can be asked for."""
    client = system.openai()
    assert system.model in [model.id for model in client.models.list()]
    assert client.models.retrieve(system.model).object == "model"


def test_an_unknown_model(system: System) -> None:
    """Another model's name is an error of OpenAI's kind."""
    with pytest.raises(openai.NotFoundError) as caught:
        system.openai().chat.completions.create(model="gpt-4", messages=messages())
    assert caught.value.code == "model_not_found"


def test_a_prompt_beyond_the_context(system: System) -> None:
    """A prompt that leaves no room is refused and says why."""
    with pytest.raises(openai.BadRequestError) as caught:
        complete(system, [5] * 10_000)
    assert caught.value.code == "context_length_exceeded"
