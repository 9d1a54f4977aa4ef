"""vLLM's processes: several ranks compute what one does, tenants share no prefix, Ray brings it all back."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from tests.serve.conftest import Cluster, Issuer, until
from tests.servers.vllm_process import PATIENCE_S, environment, vllm_python
from tests.vllm.conftest import Reference, Serve, Settings
from transformers import LlamaConfig, LlamaForCausalLM

from anamorph.serve.cluster.local import RayProcess, stop_ray

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(900)]

SALTS = Path(__file__).parents[1] / "servers" / "vllm_salts.py"
START_RAY = """
import sys
from pathlib import Path
from anamorph.serve.cluster.local import start_ray
start_ray(Path(sys.argv[1]), num_cpus=4)
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with four key and value heads, whose logits are far from flat."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=512,
        eos_token_id=3,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def greedy(folder: Path, prompt: list[int], n: int) -> list[int]:
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = model.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False)
    return [int(token) for token in out[0, len(prompt) :]]


def complete(url: str, headers: dict[str, str], **fields: Any) -> httpx.Response:
    body = {"temperature": 0.0, **fields}
    # Ray holds the request while a replica starts.
    return httpx.post(
        f"{url}/v1/completions", json=body, headers=headers, timeout=PATIENCE_S, trust_env=False
    )


@pytest.mark.parametrize("ranks", [{"tensor_parallel": 2}, {"pipeline_parallel": 2}])
def test_two_ranks_answer_what_one_model_does(
    serve: Serve, tiny: Path, issuer: Issuer, ranks: dict[str, int]
) -> None:
    """Tensor and pipeline parallel on the CPU: greedy tokens of unsharded transformers."""
    fields = {"tenant": "plaintext", "model": "tiny", "version": 0, "protection": "plaintext"}
    server = serve(
        {**fields, "engine": "vllm", "replica": str(tiny), "context_length": 256, "num_blocks": 32, **ranks}
    )
    token = issuer.token(time.time(), tenant="plaintext", model="tiny")
    prompt = [7 * i % 150 + 5 for i in range(40)]
    response = complete(server.url, {"Authorization": f"Bearer {token}"}, prompt=prompt, max_tokens=30)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["token_ids"] == greedy(tiny, prompt, 30)
    server.stop()
    until("vLLM's processes to end", lambda: not server.processes(), 30)


def stop_a_rank(ranks: list[psutil.Process]) -> None:
    """The last: neither of two ranks computes without the other."""
    max(ranks, key=lambda one: one.pid).send_signal(signal.SIGSTOP)


def test_a_rank_that_hangs_ends_the_step_before_the_request(serve: Serve, tiny: Path, issuer: Issuer) -> None:
    """Stopped under a stream: an error event that is not the deadline's, and no process is left.

    The endpoint does not come back by itself, Ray would start it again.
    """
    fields = {"tenant": "plaintext", "model": "tiny", "version": 0, "protection": "plaintext"}
    size = {"context_length": 512, "num_blocks": 32, "tensor_parallel": 2, "request_timeout_s": 60}
    server = serve({**fields, "engine": "vllm", "replica": str(tiny), **size})
    headers = {"Authorization": f"Bearer {issuer.token(time.time(), tenant='plaintext', model='tiny')}"}
    body = {"prompt": [7, 8, 9], "max_tokens": 500, "ignore_eos": True, "stream": True}
    ranks = [one for one in server.processes() if "Worker" in " ".join(one.cmdline())]
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json=body, headers=headers, timeout=120, trust_env=False
    ) as stream:
        lines = (line for line in stream.iter_lines() if line)
        next(lines)
        stop_a_rank(ranks)
        *_, last = lines
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"
    assert httpx.get(f"{server.url}/healthz", timeout=30, trust_env=False).status_code == 503
    # vLLM ends them by itself, the stopped one with SIGKILL; nobody else could.
    until("the ranks to end", lambda: not any(one in ranks for one in server.processes()), 60)
    server.stop()
    until("vLLM's processes to end", lambda: not server.processes(), 60)


def test_one_key_ids_prompts_are_no_others(tiny: Path, tmp_path: Path) -> None:
    """Our engine salts the cache by key id: equal ids under another find nothing, under the same they do."""
    python = vllm_python()
    command = [str(python), str(SALTS), str(tiny)]
    done = subprocess.run(
        command,
        env=environment(python, tmp_path),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    first, other, again = json.loads(done.stdout.splitlines()[-1])
    assert (first, other) == (0, 0)
    assert again == 64


@pytest.fixture
def cluster(tmp_path: Path, issuer: Issuer) -> Iterator[Cluster]:
    """Ray from vLLM's environment, whose workers run in it too."""
    python = vllm_python()
    command = [str(python), "-c", START_RAY, str(tmp_path)]
    subprocess.run(command, env=environment(python, tmp_path), timeout=PATIENCE_S, check=True)
    ray = RayProcess.load(tmp_path)
    assert ray is not None
    try:
        yield Cluster(ray, issuer)
    finally:
        stop_ray(ray)


def workers(ray: RayProcess) -> list[psutil.Process]:
    """vLLM's own processes within the cluster's session."""
    found = (psutil.Process(pid) for pid in ray.pids())
    return [one for one in found if "VLLM" in one.name() or "VLLM" in " ".join(one.cmdline())]


def test_under_ray_serve_it_answers_and_comes_back(
    cluster: Cluster, settings: Settings, reference: Reference
) -> None:
    """Deployed as the operator deploys it; killed, it comes back, and nothing of the first one is left."""
    name = cluster.deploy(**settings())
    until(name, lambda: cluster.state(name)["status"] == "RUNNING", PATIENCE_S)
    endpoint = cluster.endpoint()
    prompt = reference.prompts[2]
    expected = reference.encrypt(reference.greedy(prompt, 16))

    def answers() -> bool:
        fields = {"prompt": reference.encrypt(prompt), "max_tokens": 16}
        response = complete(endpoint, cluster.headers(), **fields)
        return response.status_code == 200 and response.json()["choices"][0]["token_ids"] == expected

    assert answers()
    before = {one.pid for one in workers(cluster.ray)}
    assert before
    cluster.kill_replica()
    until("another replica", answers, PATIENCE_S)
    assert not before & {one.pid for one in workers(cluster.ray)}
    cluster.remove(1)
    until("vLLM's processes to end", lambda: not workers(cluster.ray), 60)
