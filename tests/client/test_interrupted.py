"""An answer that breaks off is an error for whoever asked through the proxy, with OpenAI's own client too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import openai
import pytest
from tests.client.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Iterator

QUESTION: Any = {"model": "chat", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 500}


@pytest.fixture
def client(proxy: str, stack: Stack) -> Iterator[openai.OpenAI]:
    """OpenAI's client before a slow engine; it repeats nothing."""
    stack.rotate(delay_s=0.02)
    stack.tell(1, "gone")
    with openai.OpenAI(base_url=f"{proxy}/v1", api_key="any", max_retries=0) as made:
        yield made


def test_a_stream_that_breaks_off_raises(client: openai.OpenAI, stack: Stack) -> None:
    """The beginning of an answer is never taken for the whole: the error event becomes an exception."""
    chunks = client.chat.completions.create(stream=True, **QUESTION)
    reasons = [next(chunks).choices[0].finish_reason]
    vars(stack.endpoint(2).engine)["fails"] = True
    with pytest.raises(openai.APIError, match="broke off"):
        reasons += [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert set(reasons) == {None}


class FromTheThirdToken:
    """True from the third time that it is asked."""

    def __init__(self) -> None:
        self._asked = 0

    def __bool__(self) -> bool:
        self._asked += 1
        return self._asked > 2


def test_a_whole_answer_that_breaks_off_is_a_502(client: openai.OpenAI, stack: Stack) -> None:
    """Not streamed, nothing of it is given out: the status says that the other side failed."""
    vars(stack.endpoint(2).engine)["fails"] = FromTheThirdToken()
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(**QUESTION)
    assert (caught.value.status_code, caught.value.code) == (502, "bad_gateway")
