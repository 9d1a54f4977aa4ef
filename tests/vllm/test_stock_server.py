"""Stock vLLM, unpatched and told nothing of Anamorph, serves an encrypted replica."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.servers.vllm_process import VllmProcess, stock_server
from tests.vllm.conftest import Reference

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(900)]

N = 40
OPTIONS = {
    "dtype": "float32",
    "max-model-len": "1024",
    "kv-cache-memory-bytes": str(2**29),
    "block-size": "32",
    "served-model-name": "smol",
}


@pytest.fixture(scope="module")
def server(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmProcess]:
    started = stock_server(tmp_path_factory.mktemp("stock"), reference.replica, **OPTIONS)
    yield started
    started.stop()


def post(server: VllmProcess, **fields: Any) -> httpx.Response:
    body = {"model": "smol", "max_tokens": N, "temperature": 0, "return_token_ids": True, **fields}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=120, trust_env=False)


def choice(server: VllmProcess, **fields: Any) -> dict[str, Any]:
    response = post(server, **fields)
    assert response.status_code == 200, response.text
    return dict(response.json()["choices"][0])


@pytest.mark.parametrize("number", range(4))
def test_greedy_tokens_are_those_of_transformers(
    server: VllmProcess, reference: Reference, number: int
) -> None:
    """The answer to encrypted ids is, decrypted, what transformers answers to the plain ids in clear."""
    prompt = reference.prompts[number]
    answer = choice(server, prompt=reference.encrypt(prompt))
    assert answer["token_ids"] == reference.encrypt(reference.greedy(prompt, N))


def test_the_folder_gives_the_encrypted_end_of_text(server: VllmProcess, reference: Reference) -> None:
    """A chat answer stops by itself, at the id that stands for end of text under this key."""
    prompt = reference.prompts[0]
    answer = choice(server, prompt=reference.encrypt(prompt), max_tokens=100)
    assert answer["finish_reason"] == "stop"
    assert answer["token_ids"] == reference.encrypt(reference.greedy(prompt, 100))
    assert answer["token_ids"][-1] == reference.encrypt([reference.model.config.eos_token_id])[0]


def test_a_stream_carries_the_same_ids(server: VllmProcess, reference: Reference) -> None:
    """Chunk by chunk, the same tokens, and the end mark."""
    prompt = reference.prompts[2]
    response = post(server, prompt=reference.encrypt(prompt), stream=True)
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    found = [token for event in events[:-1] for token in json.loads(event)["choices"][0]["token_ids"]]
    assert events[-1] == "[DONE]"
    assert found == reference.encrypt(reference.greedy(prompt, N))


def test_text_is_refused(server: VllmProcess) -> None:
    """There is no tokenizer in the compute zone: a text prompt is a 400, and the server goes on."""
    assert post(server, prompt="What is the capital of France?").status_code == 400
    assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 200


def test_a_salt_keeps_cached_prefixes_apart(server: VllmProcess, reference: Reference) -> None:
    """The same ids under another salt find nothing in the cache; under their own they do."""
    prompt = reference.encrypt(reference.prompts[3])

    def cached(salt: str) -> int:
        usage = post(server, prompt=prompt, max_tokens=2, cache_salt=salt).json()["usage"]
        return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)

    assert [cached("acme.smol.v1"), cached("globex.smol.v1")] == [0, 0]
    assert cached("acme.smol.v1") >= 32


def test_the_replica_holds_no_tokenizer(reference: Reference) -> None:
    """What vLLM was given holds nothing that turns ids into text."""
    assert sorted(reference.replica.glob("*token*")) == []
    assert sorted(reference.replica.glob("*.jinja")) == []
