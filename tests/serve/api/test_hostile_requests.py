"""Whatever one request asks for, its neighbours in the batch get the tokens they would get alone."""

from __future__ import annotations

import asyncio
import json
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from anamorph.serve.engines.torch import Capacity, TorchEngine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.serve.conftest import Serve, Served

VOCAB = 160
PROMPT = [10, 20, 30]

# Allowed, and as extreme as the schema lets them be.
EXTREME: list[dict[str, Any]] = [
    {"temperature": 2, "top_p": 1e-300, "top_k": 2**62, "seed": -(2**63)},
    {"temperature": 5e-324},
    {"temperature": 1e-4, "top_p": 1.0, "top_k": 1},
    {"temperature": 1, "seed": 2**63 - 1, "n": 4, "logprobs": 20},
    {"logit_bias": {str(i): -100 for i in range(VOCAB)}},
    {"logit_bias": {str(i): 100 * (-1) ** i for i in range(VOCAB)}, "temperature": 1e-4},
    {"logit_bias": {"0": 1e-310}, "temperature": 2},
    {"stop_token_ids": list(range(64)), "ignore_eos": True},
    {"top_k": 1, "top_p": 1e-9, "temperature": 2, "ignore_eos": True, "max_tokens": 197},
    {"prompt": [0] * 180, "max_tokens": 20, "ignore_eos": True},
    {"prompt": [[VOCAB - 1], [0], [0] * 150], "max_tokens": 40, "n": 2},
]
# Not allowed; written as text, since JSON libraries would not write some of them.
REFUSED = [
    '{"prompt": [1], "temperature": NaN}',
    '{"prompt": [1], "temperature": 1e999}',
    '{"prompt": [1], "top_p": -Infinity}',
    '{"prompt": [1], "logit_bias": {"1": NaN}}',
    '{"prompt": [1], "logit_bias": {"1": 1e999}}',
    '{"prompt": [1], "logit_bias": {"-1": 1}}',
    '{"prompt": [1], "logit_bias": {"160": 1}}',
    '{"prompt": [1], "logit_bias": {"18446744073709551617": 1}}',
    '{"prompt": [-1]}',
    '{"prompt": [160]}',
    '{"prompt": [18446744073709551617]}',
    '{"prompt": [1, 2.0]}',
    '{"prompt": []}',
    '{"prompt": [[1], []]}',
    '{"prompt": [1], "stop_token_ids": [160]}',
    '{"prompt": [1], "stop_token_ids": [-1]}',
    '{"prompt": [1], "max_tokens": 1000000000000}',
    '{"prompt": [1], "n": 100}',
    '{"prompt": [1], "top_k": 1.5}',
    '{"prompt": [1], "seed": 1e30}',
    '{"prompt": ' + json.dumps([1] * 500) + "}",
]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ids = {"eos_token_id": 3, "bos_token_id": 1, "pad_token_id": 0}
    built: Any = LlamaForCausalLM(LlamaConfig.from_dict({**sizes, **heads, **ids, "initializer_range": 0.5}))
    return built.eval()


@pytest.fixture(scope="module")
def engine(model: Any) -> Iterator[TorchEngine]:
    # A cache so small that neighbours also push each other out of it.
    started = TorchEngine(model, Capacity(200, max_batch_tokens=32, num_blocks=24, max_concurrent=6))
    yield started
    started.close()


async def neighbour(served: Served, prompt: list[int]) -> list[int]:
    response = await served.complete(prompt=prompt, max_tokens=25, temperature=0)
    assert response.status_code == 200, response.text
    ids: list[int] = response.json()["choices"][0]["token_ids"]
    return ids


async def hostile(served: Served, body: str, expected: int) -> None:
    response = await served.http.post("/v1/completions", content=body, headers=served.headers())
    assert response.status_code == expected, body[:200] + response.text


@pytest.mark.parametrize("seed", range(4))
async def test_hostile_values_never_disturb_neighbours(
    serve: Serve, engine: TorchEngine, model: Any, seed: int
) -> None:
    """Extreme and impossible values run or are refused; greedy neighbours get the stock tokens."""
    served = serve(engine=engine, max_concurrent=6, max_queued=200)
    chance = random.Random(seed)
    prompts = [[chance.randrange(5, VOCAB) for _ in range(chance.randrange(1, 70))] for _ in range(8)]
    extreme = [json.dumps({"prompt": PROMPT, "max_tokens": 30, **options}) for options in EXTREME]
    attacks = [hostile(served, body, 200) for body in extreme] + [hostile(served, b, 400) for b in REFUSED]
    quiet = [neighbour(served, prompt) for prompt in prompts]
    mixed = [*attacks, *quiet]
    order = list(range(len(mixed)))
    chance.shuffle(order)
    done = dict(zip(order, await asyncio.gather(*(mixed[i] for i in order)), strict=True))
    for i, prompt in enumerate(prompts, start=len(attacks)):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=25, do_sample=False)
        assert done[i] == out[0, len(prompt) :].tolist()
    assert engine.healthy()
    assert engine.load().running == 0


async def test_seeded_answers_over_http_repeat(serve: Serve, engine: TorchEngine) -> None:
    """The same seed gives the same ``n`` different answers, whole or streamed beside others."""
    served = serve(engine=engine)
    fields = {"prompt": PROMPT, "max_tokens": 20, "temperature": 1.2, "seed": 9, "n": 3, "ignore_eos": True}
    first = [c["token_ids"] for c in (await served.complete(**fields)).json()["choices"]]
    others = [served.complete(prompt=[i, i], temperature=1, seed=i, max_tokens=30) for i in range(5, 10)]
    again = (await asyncio.gather(*others, served.complete(**fields)))[-1].json()
    assert [c["token_ids"] for c in again["choices"]] == first
    assert len({tuple(ids) for ids in first}) == 3
