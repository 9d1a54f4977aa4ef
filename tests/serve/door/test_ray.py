"""The door as a way in, on a real Ray: waking, holding, streams, hanging up, deaths, deadlines."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from tests.serve.conftest import KCV, until

from anamorph import errors
from anamorph.serve.door.affinity import PREFIX_IDS
from anamorph.serve.engines.fake import continuation
from anamorph.wire import completions as calls
from anamorph.wire.inference import KEY_ID_HEADER
from anamorph.wire.serving import app_name

if TYPE_CHECKING:
    from tests.serve.conftest import Cluster

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(600)]

PROMPT = [11, 12, 13]
# Versions and what they are for; 1 to 3 have no route of their own.
PLAIN, ASLEEP, SEVERAL, SLOW, DIRECT = 1, 2, 3, 4, 5
TO_ZERO = {"min_replicas": 0, "max_replicas": 1, "idle_s": 1}
TWO = {"min_replicas": 2, "max_replicas": 2}
TO_TWO = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2, "idle_s": 1}


def key_id(version: int) -> str:
    return f"acme.smol.v{version}.{KCV}"


def route(version: int, status: str = "serving", **fields: Any) -> dict[str, Any]:
    return {
        "version": version,
        "key_id": key_id(version),
        "status": status,
        "app": app_name("acme", "smol", version),
        **fields,
    }


ROUTES = [
    route(PLAIN),
    route(ASLEEP, max_held=2, request_timeout_s=60),
    route(SEVERAL, affinity=True),
    route(SLOW, request_timeout_s=5),
]


def running(cluster: Cluster, version: int) -> None:
    name = app_name("acme", "smol", version)
    until(name, lambda: cluster.state(name)["status"] == "RUNNING")


@pytest.fixture(scope="module", autouse=True)
def served(cluster: Cluster) -> None:
    """Four versions behind the door, and one with its own route."""
    slow = "fake:?vocab_size=500&delay_ms=400"
    cluster.deploy(PLAIN, routed=False)
    cluster.deploy(ASLEEP, routed=False, autoscaling=TO_ZERO)
    cluster.deploy(SEVERAL, routed=False, autoscaling=TWO)
    cluster.deploy(SLOW, routed=False, replica=slow)
    cluster.deploy(DIRECT, replica="fake:?vocab_size=500&delay_ms=10")
    cluster.door(ROUTES)
    for version in (PLAIN, SEVERAL, SLOW, DIRECT):
        running(cluster, version)
    until("two replicas", lambda: cluster.replicas(SEVERAL) == 2)


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=60) as client:
        yield client


def expected(version: int, n: int, prompt: list[int] = PROMPT) -> list[int]:
    return continuation(key_id(version), prompt, n, 500)


def headers(cluster: Cluster, version: int, **claims: Any) -> dict[str, str]:
    return {"Authorization": f"Bearer {cluster.token(**claims)}", KEY_ID_HEADER: key_id(version)}


def ask(http: httpx.Client, cluster: Cluster, version: int, **fields: Any) -> list[int]:
    request = {"prompt": PROMPT, **fields}
    token, endpoint = cluster.token(), cluster.endpoint(version)
    answer = calls.complete(http, endpoint, request, token=token, key_id=key_id(version))
    return answer.choices[0].token_ids


def usage(http: httpx.Client, cluster: Cluster, version: int) -> dict[str, Any]:
    found = http.get(f"{cluster.endpoint(version)}/usage", headers=headers(cluster, version, sub="operator"))
    assert found.status_code == 200, found.text
    return dict(found.json())


def knows(http: httpx.Client, cluster: Cluster, version: int) -> bool:
    """Whether the door has taken over what was pushed: Ray says RUNNING a moment earlier."""
    answer = http.get(f"{cluster.endpoint(version)}/healthz", headers=headers(cluster, version))
    return answer.status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_forwarded_answer_is_a_direct_one(cluster: Cluster, http: httpx.Client, stream: bool) -> None:
    """Same headers, same events but for ids and times; the key ids differ, so each has its own tokens."""
    shapes = []
    for version in (PLAIN, DIRECT):
        body = {"prompt": PROMPT, "max_tokens": 40, "stream": stream, "stream_options": None}
        url = f"{cluster.endpoint(version)}/v1/completions"
        answer = http.post(url, json=body, headers=headers(cluster, version))
        kept = {k: v for k, v in answer.headers.items() if k in {"content-type", "cache-control"}}
        assert answer.headers[KEY_ID_HEADER] == key_id(version)
        text = re.sub(r"cmpl-[0-9a-f]+|\"created\":[0-9]+|acme.smol.v[0-9]+", "", answer.text)
        shapes.append((answer.status_code, kept, re.sub(r"\"token_ids\":\[[0-9,]+\]", "", text)))
    assert shapes[0] == shapes[1]
    assert ask(http, cluster, PLAIN, max_tokens=30) == expected(PLAIN, 30)


def test_tokens_come_as_they_are_made(cluster: Cluster, http: httpx.Client) -> None:
    """The first event is there long before the last could be."""
    body = {"prompt": PROMPT, "max_tokens": 4, "stream": True}
    with http.stream(
        "POST", f"{cluster.endpoint(SLOW)}/v1/completions", json=body, headers=headers(cluster, SLOW)
    ) as answer:
        lines = answer.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["token_ids"]
        assert usage(http, cluster, SLOW)["in_flight"] == 1
        assert [line for line in lines if line][-1] == "data: [DONE]"
    until("the count", lambda: usage(http, cluster, SLOW)["in_flight"] == 0, 5)


def test_usage_is_what_crossed_the_wire(cluster: Cluster, http: httpx.Client) -> None:
    """Prompts and answers of all replicas under one source; only the operator reads it."""
    before = usage(http, cluster, SEVERAL)
    for _ in range(6):
        ask(http, cluster, SEVERAL, max_tokens=50)
    after = usage(http, cluster, SEVERAL)
    assert after["source"] == before["source"]
    assert after["tokens"] - before["tokens"] == 6 * 53
    url = f"{cluster.endpoint(SEVERAL)}/usage"
    assert http.get(url, headers=headers(cluster, SEVERAL)).status_code == 401


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_cancels_in_the_engine(cluster: Cluster, http: httpx.Client, stream: bool) -> None:
    """A client that leaves frees its place behind the door, long before the answer would have ended.

    The door forwards version 9 to the engine of the version with a route, which can be asked directly.
    """
    cluster.door([*ROUTES, {**route(9), "app": app_name("acme", "smol", DIRECT)}])
    until("the door to know", lambda: knows(http, cluster, 9))
    body = {"prompt": PROMPT, "max_tokens": 1900, "stream": stream}
    request: dict[str, Any] = {"json": body, "headers": headers(cluster, DIRECT)}
    url = f"{cluster.endpoint(9)}/v1/completions"
    if stream:
        with http.stream("POST", url, **request) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert cluster.usage(DIRECT)["in_flight"] == 1
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, timeout=0.5, **request)
    # Alone it would go on for twenty seconds.
    until("the engine to stop", lambda: cluster.usage(DIRECT)["in_flight"] == 0, 10)
    until("the count", lambda: usage(http, cluster, 9)["in_flight"] == 0, 10)
    cluster.door(ROUTES)


def refusals(cluster: Cluster) -> Iterator[tuple[int, str, dict[str, str]]]:
    """Requests that must not start anything, with the status that they get."""
    place = cluster.endpoint(ASLEEP)
    mine = headers(cluster, ASLEEP)
    yield 401, f"{place}/v1/completions", {}
    yield 401, f"{place}/v1/completions", {"Authorization": "Bearer x.y.z"}
    yield 401, f"{place}/v1/completions", headers(cluster, ASLEEP, tenant="globex")
    yield 401, f"{place}/v1/completions", headers(cluster, ASLEEP, exp=int(time.time()) - 100)
    yield 404, f"{cluster.endpoint(77)}/v1/completions", mine
    yield 401, f"{place}/usage", mine
    yield 200, f"{place}/usage", headers(cluster, ASLEEP, sub="operator")
    yield 200, f"{place}/healthz", mine
    yield 401, f"{place}/healthz", {}
    yield 404, f"{place}/metrics", mine


def test_whoever_may_not_ask_wakes_nothing(cluster: Cluster, http: httpx.Client) -> None:
    """No token, another's token, an unknown version, readings, pushes of key state: none starts a replica."""
    until("sleep", lambda: cluster.replicas(ASLEEP) == 0)
    for status, url, sent in refusals(cluster):
        assert http.get(url, headers=sent).status_code == status, url
    big = http.post(
        f"{cluster.endpoint(ASLEEP)}/v1/completions", content=b"x" * 2**21, headers=headers(cluster, ASLEEP)
    )
    assert big.status_code == 413
    for state, answer in (("suspended", 403), ("gone", 410)):
        cluster.door([route(ASLEEP, state)])
        until(state, partial(answers, http, cluster, answer))
    config = cluster.apps[app_name("acme", "smol", ASLEEP)]["deployments"][0]["user_config"]
    for pushed in ("suspended", "serving"):
        config["status"] = pushed
        cluster.door(ROUTES)
    for _ in range(20):
        assert cluster.replicas(ASLEEP) == 0
        time.sleep(0.1)


def answers(http: httpx.Client, cluster: Cluster, status: int) -> bool:
    url = f"{cluster.endpoint(ASLEEP)}/v1/completions"
    return http.post(url, headers=headers(cluster, ASLEEP)).status_code == status


def test_a_held_request_wakes_its_version_which_goes_to_sleep_again(
    cluster: Cluster, http: httpx.Client
) -> None:
    """From none to one under the request, and back to none; what was served stays counted."""
    until("sleep", lambda: cluster.replicas(ASLEEP) == 0)
    before = usage(http, cluster, ASLEEP)["tokens"]
    for turn in (1, 2):
        assert ask(http, cluster, ASLEEP, max_tokens=7) == expected(ASLEEP, 7)
        assert cluster.replicas(ASLEEP) == 1
        until("sleep", lambda: cluster.replicas(ASLEEP) == 0, 60)
        assert usage(http, cluster, ASLEEP)["tokens"] - before == turn * 10
        assert cluster.state(app_name("acme", "smol", ASLEEP))["status"] == "RUNNING"


def test_what_is_held_is_bounded(cluster: Cluster) -> None:
    """Two may wait for a sleeping version; the others come back later, and the two are answered."""
    until("sleep", lambda: cluster.replicas(ASLEEP) == 0, 60)
    seen: Counter[tuple[int, str | None]] = Counter()

    def one() -> None:
        body = {"prompt": PROMPT, "max_tokens": 3}
        url = f"{cluster.endpoint(ASLEEP)}/v1/completions"
        answer = httpx.post(url, json=body, headers=headers(cluster, ASLEEP), timeout=60)
        seen[answer.status_code, answer.headers.get("retry-after")] += 1

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {(200, None): 2, (429, "5"): 6}


def test_a_deadline_holds_before_and_after_the_beginning(cluster: Cluster, http: httpx.Client) -> None:
    """503 where nothing has been sent yet; an error event and no [DONE] in a stream."""
    body = {"prompt": PROMPT, "max_tokens": 100}
    url = f"{cluster.endpoint(SLOW)}/v1/completions"
    whole = http.post(url, json=body, headers=headers(cluster, SLOW))
    assert (whole.status_code, whole.json()["error"]["code"]) == (503, "timeout")
    streamed = http.post(url, json=body | {"stream": True}, headers=headers(cluster, SLOW))
    *_, last = [line for line in streamed.text.split("\n\n") if line]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"


def kill(cluster: Cluster, version: int) -> None:
    os.kill(until("a replica", lambda: cluster._replica(version)), signal.SIGKILL)


def test_a_death_in_the_middle_is_an_event(cluster: Cluster, http: httpx.Client) -> None:
    """The connection is the door's, so it can still say that the answer broke off; then all is well again."""
    body = {"prompt": PROMPT, "max_tokens": 1500, "stream": True}
    with http.stream(
        "POST", f"{cluster.endpoint(PLAIN)}/v1/completions", json=body, headers=headers(cluster, PLAIN)
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        kill(cluster, PLAIN)
        *_, last = [line for line in lines if line]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["code"], error["type"]) == ("unavailable", "server_error")
    assert usage(http, cluster, PLAIN)["in_flight"] == 0
    assert ask(http, cluster, PLAIN, max_tokens=5) == expected(PLAIN, 5)


def test_a_death_before_the_beginning_is_a_503(cluster: Cluster, http: httpx.Client) -> None:
    """With Retry-After, since nothing has been answered."""
    killer = threading.Timer(0.7, kill, (cluster, PLAIN))
    killer.start()
    with pytest.raises(errors.Unavailable) as caught:
        ask(http, cluster, PLAIN, max_tokens=1500)
    killer.join()
    assert caught.value.retry_after == 1
    assert ask(http, cluster, PLAIN, max_tokens=5) == expected(PLAIN, 5)


def test_what_cannot_wake_says_so_and_is_told_apart(cluster: Cluster, http: httpx.Client) -> None:
    """Ray reports it unhealthy, without a replica, and tries no more; callers get a 503 in time.

    That is what the operator takes for a failed deployment: it gives a staged version up for it,
    and deploys one in use anew.
    """
    name = cluster.deploy(8, routed=False, autoscaling=TO_ZERO, replica="/nowhere")
    cluster.door([*ROUTES, route(8, request_timeout_s=60)])
    until("the door to know", lambda: knows(http, cluster, 8))
    with pytest.raises(errors.Unavailable):
        ask(http, cluster, 8, max_tokens=1)
    until("the verdict", lambda: cluster.state(name)["status"] == "UNHEALTHY", 60)
    until("the end of all tries", lambda: cluster.replicas(8) == 0, 60)
    with pytest.raises(errors.Unavailable):
        ask(http, cluster, 8, max_tokens=1)
    assert cluster.state(name)["status"] == "UNHEALTHY"
    cluster.remove(8)


def capacity(cluster: Cluster, *more: str) -> tuple[int, dict[str, Any]]:
    """What ``anamorph capacity`` says of this Ray."""
    place = ["--ray-dashboard", cluster.ray.dashboard_url, "--ray-token-file", str(cluster.ray.token_file)]
    command = [sys.executable, "-m", "anamorph.cli", "capacity", *place, "--json", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, json.loads(done.stdout)


def test_capacity_is_read_from_ray(cluster: Cluster, tmp_path: Path) -> None:
    """Its one node with all that it has; what stands, sleeping versions with nothing; and a verdict."""
    code, found = capacity(cluster)
    assert code == 0
    [node] = found["nodes"]
    assert node["has"] == {"cpus": 4, "gpus": 0, "memory_mib": None}
    ranks = {app["app"]: app["ranks"] for app in found["applications"]}
    assert (ranks["acme.smol.v1"], ranks["acme.smol.v2"], ranks["acme.smol.v3"]) == (1, 0, 2)
    assert node["left"]["cpus"] == pytest.approx(4 - 0.1 * sum(ranks.values()))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"0")
    assert capacity(cluster, "--base", str(tmp_path))[0] == 0
    code, found = capacity(cluster, "--base", str(tmp_path), "--num-gpus", "1")
    assert (code, found["wanted"]["fits"]) == (1, False)
    assert "1 GPUs" in found["wanted"]["reason"]


def answered(cluster: Cluster, version: int) -> Counter[str]:
    """How many forwarded requests each replica has answered, by its log."""
    name = app_name("acme", "smol", version)
    folder = cluster.ray.temp_dir / "session_latest" / "logs" / "serve"
    files = folder.glob(f"replica*{name}*engine*.log")
    return Counter({file.name: len(re.findall(r"CALL \S+ OK", file.read_text())) for file in files})


def test_prompts_that_begin_alike_go_to_one_replica(cluster: Cluster, http: httpx.Client) -> None:
    """Twenty prompts with one beginning on one replica; beginnings of their own are spread over both."""
    before = answered(cluster, SEVERAL)
    for i in range(20):
        ask(http, cluster, SEVERAL, prompt=[7] * PREFIX_IDS + [i], max_tokens=1)
    until("the logs", lambda: (answered(cluster, SEVERAL) - before).total() >= 20, 20)
    alike = answered(cluster, SEVERAL) - before
    assert sorted(alike.values()) == [20]
    for i in range(20):
        ask(http, cluster, SEVERAL, prompt=[i] * PREFIX_IDS, max_tokens=1)
    until("the logs", lambda: (answered(cluster, SEVERAL) - before).total() >= 40, 20)
    assert len(answered(cluster, SEVERAL) - before) == 2


def streams(http: httpx.Client, cluster: Cluster, version: int, n: int) -> ExitStack:
    """``n`` answers that have begun and go on until this is closed."""
    held = ExitStack()
    body = {"prompt": PROMPT, "max_tokens": 1900, "stream": True}
    url = f"{cluster.endpoint(version)}/v1/completions"
    for _ in range(n):
        answer = held.enter_context(http.stream("POST", url, json=body, headers=headers(cluster, version)))
        assert answer.status_code == 200
    return held


def test_load_brings_another_replica_which_leaves_with_it(cluster: Cluster, http: httpx.Client) -> None:
    """More is being answered than one replica is to have: two answer; without it, one stays."""
    busy = 6
    cluster.deploy(busy, routed=False, autoscaling=TO_TWO, replica="fake:?vocab_size=500&delay_ms=100")
    running(cluster, busy)
    cluster.door([*ROUTES, route(busy, affinity=True)])
    until("the door to know", lambda: knows(http, cluster, busy))
    assert cluster.replicas(busy) == 1
    numbers = count()

    def both_answer() -> bool:
        prompt = [next(numbers)] * PREFIX_IDS
        assert ask(http, cluster, busy, prompt=prompt, max_tokens=1) == expected(busy, 1, prompt)
        return len(answered(cluster, busy)) == 2

    with streams(http, cluster, busy, 6):
        until("two replicas", lambda: cluster.replicas(busy) == 2)
        until("answers of both", both_answer)
    until("one replica", lambda: cluster.replicas(busy) == 1, 120)
    assert ask(http, cluster, busy, max_tokens=3) == expected(busy, 3)
    cluster.remove(busy)
    cluster.door(ROUTES)
