"""``anamorph chat``: one question through the local proxy, answered as it comes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from anamorph.cli.machine.home import MODEL, TENANTS, Home, HomeOption
from anamorph.errors import ServiceError


def chat(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    home: HomeOption = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.0,
) -> None:
    """Ask a question through the local OpenAI proxy, with the ordinary `openai` client."""
    import openai

    url = Home.at(home).running().urls[f"proxy-{TENANTS[0]}"]
    try:
        with openai.OpenAI(base_url=url, api_key="local") as client:
            chunks = client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": question}],
                max_tokens=max_tokens,
                temperature=temperature,
                stream=True,
            )
            for chunk in chunks:
                sys.stdout.write((chunk.choices[0].delta.content or "") if chunk.choices else "")
                sys.stdout.flush()
    except openai.OpenAIError as error:
        raise ServiceError(f"the proxy did not answer: {error}") from None
    print()
