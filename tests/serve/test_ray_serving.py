"""The applications on a real Ray: deployment, streams, disconnects, kills, refusals."""

from __future__ import annotations

import json
import random
import re
import shutil
import threading
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import anamorph
from anamorph import errors
from anamorph.keys import TenantKey
from anamorph.serve.engines.fake import continuation
from anamorph.wire import completions as calls
from anamorph.wire.serving import app_name

if TYPE_CHECKING:
    from tests.serve.conftest import Cluster

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(600)]

PROMPT = [11, 12, 13]
OTHER = "acme.smol.v9.0123456789abcdef"
SECRET = "correct horse battery staple"
DOCS = Path(__file__).parents[2] / "docs" / "serving.md"


def until(condition: Callable[[], Any], seconds: float = 90) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return value


@pytest.fixture(scope="module")
def endpoint(cluster: Cluster) -> str:
    """Version 1 on the fake engine."""
    return cluster.serve(1)


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=60) as client:
        yield client


def expected(cluster: Cluster, n: int, prompt: list[int] = PROMPT, version: int = 1) -> list[int]:
    key_id = cluster.apps[app_name("acme", "smol", version)]["args"]["key_id"]
    return continuation(key_id, prompt, n, 500)


def ask(http: httpx.Client, cluster: Cluster, version: int = 1, **fields: Any) -> list[int]:
    key_id = cluster.apps[app_name("acme", "smol", version)]["args"]["key_id"]
    request = {"prompt": PROMPT, **fields}
    place = cluster.endpoint(version)
    answer = calls.complete(http, place, request, token=cluster.token(), key_id=key_id)
    return answer.choices[0].token_ids


def test_an_application_answers_and_streams(cluster: Cluster, endpoint: str, http: httpx.Client) -> None:
    """Whole, and token by token: chunks arrive while later ones are still to be made."""
    assert ask(http, cluster, max_tokens=9) == expected(cluster, 9)
    body = {"prompt": PROMPT, "max_tokens": 40, "stream": True}
    key_id = cluster.headers()["Anamorph-Key-Id"]
    chunks = list(calls.stream(http, endpoint, body, token=cluster.token(), key_id=key_id))
    assert [c.choices[0].token_ids for c in chunks] == [[i] for i in expected(cluster, 40)]


def test_refusals_reach_the_client_in_shape(cluster: Cluster, endpoint: str, http: httpx.Client) -> None:
    """What the application refuses passes Ray's proxy unchanged."""
    cases: list[tuple[int, dict[str, Any]]] = [
        (422, {"json": {"prompt": SECRET}, "headers": cluster.headers()}),
        (401, {"json": {"prompt": PROMPT}}),
        (401, {"json": {"prompt": PROMPT}, "headers": cluster.headers(tenant="globex")}),
        (
            409,
            {
                "json": {"prompt": PROMPT},
                "headers": {**cluster.headers(), "Anamorph-Key-Id": OTHER},
            },
        ),
        (413, {"content": b"x" * 2**21, "headers": cluster.headers()}),
    ]
    for status, request in cases:
        response = http.post(f"{endpoint}/v1/completions", **request)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_the_queue_answers_429_before_rays_does(cluster: Cluster) -> None:
    """Sixty clients on four places: some are served, the others told to come back, none waits in Ray."""
    cluster.serve(2, replica="fake:?vocab_size=500&delay_ms=20", max_concurrent=2, max_queued=2)
    seen: Counter[int] = Counter()

    def one() -> None:
        body = {"prompt": PROMPT, "max_tokens": 50}
        url, headers = f"{cluster.endpoint(2)}/v1/completions", cluster.headers(2)
        response = httpx.post(url, json=body, headers=headers, timeout=60)
        seen[response.status_code] += 1

    threads = [threading.Thread(target=one) for _ in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cluster.remove(2)
    assert seen[200] >= 4
    assert seen[200] + seen[429] == 60


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_cancels_through_ray(
    cluster: Cluster, endpoint: str, http: httpx.Client, stream: bool
) -> None:
    """A client that leaves frees its place in the engine, long before the answer would have ended."""
    body = {"prompt": PROMPT, "max_tokens": 1900, "stream": stream}
    request: dict[str, Any] = {"json": body, "headers": cluster.headers()}
    if stream:
        with http.stream("POST", f"{endpoint}/v1/completions", **request) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{endpoint}/v1/completions", timeout=0.5, **request)
    until(lambda: cluster.usage()["in_flight"] == 0, 3)


def test_key_state_is_pushed_without_a_restart(cluster: Cluster, endpoint: str, http: httpx.Client) -> None:
    """Suspended, gone and serving again within a write; the process stays the same."""
    before = cluster.usage()["source"]
    config = cluster.apps[app_name("acme", "smol", 1)]["deployments"][0]["user_config"]
    for status, answer in (("suspended", 403), ("gone", 410), ("serving", 200)):
        config["status"] = status
        cluster.put()
        body = {"prompt": PROMPT, "max_tokens": 1}

        def answered(body: dict[str, Any] = body, answer: int = answer) -> bool:
            response = http.post(f"{endpoint}/v1/completions", json=body, headers=cluster.headers())
            return response.status_code == answer

        until(answered, 20)
    assert cluster.usage()["source"] == before


def test_the_door_says_why_a_version_does_not_answer(cluster: Cluster, http: httpx.Client) -> None:
    """410, 403, 503 with Retry-After and 404 for paths without an application; 401 comes first."""
    states = {4: "gone", 5: "suspended", 6: "pending", 7: "serving"}
    cluster.door(
        [{"version": v, "key_id": f"acme.smol.v{v}.{'0' * 16}", "status": s} for v, s in states.items()]
    )
    token = {"Authorization": f"Bearer {cluster.token()}"}
    answers = {4: (410, None), 5: (403, None), 6: (503, "5"), 7: (503, "1"), 8: (404, None)}
    for version, expected in answers.items():
        url = f"{cluster.endpoint(version)}/v1/completions"
        response = http.post(url, json={"prompt": PROMPT}, headers=token)
        assert (response.status_code, response.headers.get("retry-after")) == expected
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert http.get(f"{cluster.endpoint(4)}/v1/models").status_code == 401
    stranger = {"Authorization": f"Bearer {cluster.token(tenant='globex')}"}
    assert http.get(f"{cluster.endpoint(4)}/v1/models", headers=stranger).status_code == 401


class Load:
    """Clients that never stop asking; every answer is judged."""

    def __init__(self, cluster: Cluster, clients: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self._cluster = cluster
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def reached(self, wanted: int) -> bool:
        return self.outcomes["right"] >= wanted

    def _run(self, number: int) -> None:
        chance = random.Random(number)
        with httpx.Client(timeout=60) as http:
            while not self._stop.is_set():
                self.outcomes[self._one(http, chance, stream=number % 2 == 0)] += 1

    def _one(self, http: httpx.Client, chance: random.Random, *, stream: bool) -> str:
        prompt, n = [chance.randrange(500) for _ in range(5)], chance.randrange(1, 40)
        try:
            ids = self._ids(http, {"prompt": prompt, "max_tokens": n}, stream=stream)
        except (errors.Unavailable, errors.StreamInterrupted) as error:
            self._stop.wait(0.1)
            return type(error).__name__
        except Exception as error:  # noqa: BLE001 - judged by the test, not lost in a thread
            return f"undocumented {error!r}"
        return "right" if ids == expected(self._cluster, n, prompt) else "wrong"

    def _ids(self, http: httpx.Client, request: dict[str, Any], *, stream: bool) -> list[int]:
        place, token = self._cluster.endpoint(), self._cluster.token()
        key_id = self._cluster.headers()["Anamorph-Key-Id"]
        if stream:
            chunks = list(calls.stream(http, place, request, token=token, key_id=key_id))
        else:
            chunks = [calls.complete(http, place, request, token=token, key_id=key_id)]
        return [i for chunk in chunks for choice in chunk.choices for i in choice.token_ids]


@pytest.mark.usefixtures("endpoint")
def test_a_killed_replica_comes_back_and_never_answers_wrong(cluster: Cluster) -> None:
    """kill -9 at twenty seeded moments under load: right answers or documented errors, then right again."""
    chance = random.Random(20)
    with Load(cluster, 4) as load:
        for _ in range(20):
            time.sleep(chance.uniform(0.05, 1.5))
            cluster.kill_replica()
            wanted = load.outcomes["right"] + 5
            until(partial(load.reached, wanted), 60)
    assert set(load.outcomes) <= {"right", "Unavailable", "StreamInterrupted"}, load.outcomes
    assert load.outcomes["right"] > 100


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": 160, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ids = {"eos_token_id": 3, "bos_token_id": 1, "initializer_range": 0.5}
    config = LlamaConfig.from_dict({**sizes, **heads, **ids})
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def key() -> TenantKey:
    return TenantKey.generate("acme", "smol", 3)


@pytest.fixture(scope="module")
def replica(base: Path, key: TenantKey, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("replica") / "v3"
    anamorph.fold(base, out, key)
    return out


def replica_args(folder: Path, key: TenantKey) -> dict[str, Any]:
    anchor = {"key_id": key.id, "public_key": b64encode(key.public_key()).decode()}
    return {"replica": str(folder), "engine": "torch", "context_length": 400, "num_blocks": 32, **anchor}


def test_a_verified_replica_answers_in_the_tenants_coordinates(
    cluster: Cluster, base: Path, replica: Path, key: TenantKey, http: httpx.Client
) -> None:
    """Encrypted prompt in, encrypted greedy answer out: decrypted, it is what the base answers."""
    cluster.serve(3, **replica_args(replica, key))
    image = key.vocab_key().permutation(160).tolist()
    plain = {encrypted: i for i, encrypted in enumerate(image)}
    model: Any = LlamaForCausalLM.from_pretrained(base)
    truth = model.generate(torch.tensor([[10, 20, 30]]), max_new_tokens=20, do_sample=False)[0, 3:].tolist()
    options = {"prompt": [image[i] for i in (10, 20, 30)], "max_tokens": 20, "temperature": 0}
    answer = calls.complete(http, cluster.endpoint(3), options, token=cluster.token(), key_id=key.id)
    assert [plain[i] for i in answer.choices[0].token_ids] == truth
    cluster.remove(3)


def flip(folder: Path) -> None:
    file = folder / "model.safetensors"
    file = file if file.exists() else next(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def resign(folder: Path) -> None:
    """Alter the replica and sign it again, with a key that is as good as any but not the tenant's."""
    from anamorph.replica import Identity, ReplicaManifest, seal

    flip(folder)
    manifest = ReplicaManifest.from_bytes((folder / "anamorph.json").read_bytes())
    identity = Identity.model_validate(manifest.model_dump(include=set(Identity.model_fields)))
    seal(folder, identity, TenantKey.generate("acme", "smol", 3).sign)


def without_anchor(_: Path) -> None:
    """Nothing about the folder changes: the settings will lack the public key."""


@pytest.mark.parametrize("tamper", [flip, resign, without_anchor])
def test_a_replica_that_does_not_verify_is_never_served(
    cluster: Cluster, replica: Path, key: TenantKey, tmp_path: Path, tamper: Callable[[Path], None]
) -> None:
    """One flipped byte, a foreign signature or no anchor: the deployment fails and says why."""
    altered = tmp_path / "altered"
    shutil.copytree(replica, altered)
    tamper(altered)
    args = replica_args(altered, key)
    if tamper is without_anchor:
        del args["public_key"]
    name = cluster.deploy(3, **args)
    until(lambda: cluster.state(name)["status"] == "DEPLOY_FAILED")
    assert "ReplicaRefused" in cluster.state(name)["deployments"]["engine"]["message"]
    cluster.remove(3)


def test_the_documented_list_of_applications_works(cluster: Cluster, http: httpx.Client) -> None:
    """The JSON of docs/serving.md, with our keys in it, is accepted by Ray and serves."""
    text = re.search(r"```json applications\n(.*?)```", DOCS.read_text(), re.S)
    assert text is not None
    written = json.loads(text[1])
    assert set(written) == {"proxy_location", "http_options", "applications"}
    for app in written["applications"]:
        app["deployments"][0]["user_config"]["jwks"] = cluster.jwks
        if app["name"] != "door":
            app["args"] |= {"replica": "fake:?vocab_size=500", "engine": "fake"}
        cluster.apps[app["name"]] = app
    cluster.put()
    until(lambda: cluster.state("acme.smol.v1")["status"] == "RUNNING")
    assert ask(http, cluster, max_tokens=3) == expected(cluster, 3)


def test_logs_hold_no_text_and_no_credentials(cluster: Cluster) -> None:
    """After everything above: neither refused plaintext nor tokens nor prompts in any of Ray's files."""
    logs = cluster.logs()
    assert "POST /acme/smol/v1 200" in logs  # the access log is there, and carries routes
    assert SECRET not in logs
    assert cluster.token().split(".")[0] not in logs
    assert str(PROMPT) not in logs
