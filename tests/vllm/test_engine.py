"""The vLLM engine behind our own API: what docs/serving.md promises, on a real vLLM."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from tests.serve.conftest import Issuer, until
from tests.servers.vllm_process import VllmProcess
from tests.vllm.conftest import Reference, Serve, Settings

from anamorph.wire.inference import KEY_ID_HEADER

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(900)]

N = 32


class Caller:
    """A client of one endpoint; ids are plain on this side."""

    def __init__(self, server: VllmProcess, reference: Reference, issuer: Issuer) -> None:
        self.server = server
        self._reference = reference
        token = issuer.token(time.time())
        self.headers = {"Authorization": f"Bearer {token}", KEY_ID_HEADER: reference.key.id}

    @property
    def url(self) -> str:
        return f"{self.server.url}/v1/completions"

    def body(self, prompt: list[int], **fields: Any) -> dict[str, Any]:
        return {"prompt": self._reference.encrypt(prompt), "max_tokens": N, "temperature": 0.0, **fields}

    def post(self, prompt: list[int], **fields: Any) -> httpx.Response:
        body = self.body(prompt, **fields)
        return httpx.post(self.url, json=body, headers=self.headers, timeout=120, trust_env=False)

    def choices(self, prompt: list[int], **fields: Any) -> list[dict[str, Any]]:
        response = self.post(prompt, **fields)
        assert response.status_code == 200, response.text
        return list(response.json()["choices"])

    def ids(self, prompt: list[int], **fields: Any) -> list[int]:
        return list(self.choices(prompt, **fields)[0]["token_ids"])

    def inside(self) -> float:
        """Sequences that the engine computes or holds, as its metrics say."""
        text = httpx.get(f"{self.server.url}/metrics", timeout=30, trust_env=False).text
        return sum(float(n) for n in re.findall(r"^anamorph_engine_sequences\w+\{.*\} (\S+)$", text, re.M))


@pytest.fixture(scope="module")
def caller(serve: Serve, settings: Settings, reference: Reference, issuer: Issuer) -> Caller:
    return Caller(serve(settings(max_concurrent=8, num_blocks=40)), reference, issuer)


def test_greedy_tokens_are_those_of_transformers(caller: Caller, reference: Reference) -> None:
    """All prompts at once, of very different lengths: each gets what transformers answers in clear."""
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(caller.ids, reference.prompts))
    assert found == [reference.encrypt(reference.greedy(prompt, N)) for prompt in reference.prompts]


def test_a_full_cache_delays_but_does_not_change(caller: Caller, reference: Reference) -> None:
    """More tokens than the cache holds: sequences are pushed out, come back, and go on where they were."""
    prompts = [reference.prompts[3][start : start + 160] for start in range(0, 96, 12)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda p: caller.ids(p, max_tokens=N, ignore_eos=True), prompts))
    expected = [reference.greedy(prompt, N, eos_token_id=-1) for prompt in prompts]
    assert found == [reference.encrypt(ids) for ids in expected]


def test_ends_of_sequences(caller: Caller, reference: Reference) -> None:
    """The model's own end, a stop id of the request, and neither; the token that stops is delivered."""
    prompt = reference.prompts[0]
    answer = reference.greedy(prompt, 100)
    (own,) = caller.choices(prompt, max_tokens=100)
    assert (own["token_ids"], own["finish_reason"]) == (reference.encrypt(answer), "stop")
    assert own["stop_reason"] is None
    stop = reference.encrypt(answer)[3]
    (stopped,) = caller.choices(prompt, stop_token_ids=[stop])
    assert (stopped["token_ids"], stopped["stop_reason"]) == (reference.encrypt(answer)[:4], stop)
    (on,) = caller.choices(prompt, max_tokens=len(answer) + 8, ignore_eos=True)
    assert (len(on["token_ids"]), on["finish_reason"]) == (len(answer) + 8, "length")


def test_a_seed_means_the_same_whatever_runs_beside_it(caller: Caller, reference: Reference) -> None:
    """Alone or among others, the seed decides; another seed, and another of ``n``, draw otherwise."""
    prompt, options = reference.prompts[2], {"temperature": 1.1, "top_p": 0.95, "top_k": 200}
    alone = caller.ids(prompt, seed=7, **options)
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(caller.ids, p, seed=1, temperature=1.5) for p in reference.prompts]
        beside = caller.ids(prompt, seed=7, **options)
        assert all(len(other.result()) > 0 for other in others)
    assert beside == alone
    assert caller.ids(prompt, seed=8, **options) != alone
    first, second = caller.choices(prompt, seed=7, n=2, **options)
    assert first["token_ids"] == alone != second["token_ids"]
    # vLLM takes -1 for "no seed"; here it is a seed like any other.
    assert caller.ids(prompt, seed=-1, **options) == caller.ids(prompt, seed=-1, **options)


def test_narrow_sampling_is_greedy(caller: Caller, reference: Reference) -> None:
    """One token to choose from leaves no choice, whatever the temperature."""
    prompt = reference.prompts[2]
    expected = reference.encrypt(reference.greedy(prompt, N))
    assert caller.ids(prompt, temperature=2.0, top_k=1, seed=3) == expected
    assert caller.ids(prompt, temperature=2.0, top_p=1e-6, seed=3) == expected
    assert caller.ids(prompt, temperature=5e-5, seed=3) == expected


def test_logprobs_are_the_models_own(caller: Caller, reference: Reference) -> None:
    """Before bias and temperature: a biased token is chosen, and its true probability reported."""
    prompt = reference.prompts[2]
    own = reference.logprobs(prompt)
    unlikely = int(own.argsort()[1000])
    (encrypted,) = reference.encrypt([unlikely])
    (choice,) = caller.choices(prompt, max_tokens=1, logprobs=3, logit_bias={str(encrypted): 100.0})
    assert choice["token_ids"] == [encrypted]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx([float(own[unlikely])], abs=1e-3)
    values, likely = own.topk(3)
    names = [f"token_id:{token}" for token in reference.encrypt([int(token) for token in likely])]
    assert set(choice["logprobs"]["top_logprobs"][0]) == {*names, f"token_id:{encrypted}"}
    found = [choice["logprobs"]["top_logprobs"][0][name] for name in names]
    assert found == pytest.approx([float(value) for value in values], abs=1e-3)


def test_what_vllm_would_silently_change_is_refused_by_name(caller: Caller, reference: Reference) -> None:
    """vLLM raises a temperature below 0.01 to 0.01; here it is a 400 that names the field."""
    response = caller.post(reference.prompts[2], temperature=0.005)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "temperature")


def test_text_is_refused_and_not_logged(caller: Caller) -> None:
    """A text prompt is a 422, and neither it nor anything of it is in the log."""
    body = {"prompt": "sesame opens the mountain", "max_tokens": 4}
    response = httpx.post(caller.url, json=body, headers=caller.headers, timeout=30, trust_env=False)
    assert response.status_code == 422
    assert "sesame" not in caller.server.log


def test_who_leaves_frees_the_place(caller: Caller, reference: Reference) -> None:
    """A stream that is closed is aborted in vLLM, long before its last token."""
    body = caller.body(reference.prompts[2], max_tokens=900, ignore_eos=True, stream=True)
    with httpx.stream(
        "POST", caller.url, json=body, headers=caller.headers, timeout=60, trust_env=False
    ) as stream:
        lines = stream.iter_lines()  # kept: closing it would close the connection
        assert next(lines).startswith("data: ")
        assert caller.inside() > 0
    until("the sequence to leave", lambda: caller.inside() == 0, 10)


def test_a_dead_core_is_an_error_and_quotes_nothing(caller: Caller, reference: Reference) -> None:
    """A worker that is killed ends streams in an error event; the log names no option of a request.

    The last test of this file: the endpoint does not come back by itself, Ray would start it again.
    """
    marks = reference.encrypt([4242, 31337])
    fields = {"max_tokens": 900, "ignore_eos": True, "stream": True, "stop_token_ids": marks}
    body = caller.body(reference.prompts[2], **fields, logit_bias={str(mark): -1.5 for mark in marks})
    with httpx.stream(
        "POST", caller.url, json=body, headers=caller.headers, timeout=120, trust_env=False
    ) as stream:
        lines = (line for line in stream.iter_lines() if line)
        next(lines)
        leaves = [one for one in caller.server.processes() if not one.children()]
        for leaf in leaves:
            leaf.kill()
        last = list(lines)[-1]
    assert "error" in json.loads(last.removeprefix("data: "))
    assert httpx.get(f"{caller.server.url}/healthz", timeout=30, trust_env=False).status_code == 503
    assert caller.post(reference.prompts[2]).status_code == 503
    for mark in marks:
        assert not re.search(rf"\b{mark}\b", caller.server.log)
    caller.server.stop()
    until("vLLM's processes to end", lambda: not caller.server.processes(), 30)
