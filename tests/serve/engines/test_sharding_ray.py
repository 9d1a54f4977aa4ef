"""Sharded replicas on a real Ray of several nodes: placement, tokens, and the death of a rank."""

from __future__ import annotations

import os
import signal
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import httpx
import psutil
import pytest
import torch
from tests.serve.conftest import Cluster, Issuer, until
from tests.servers.hosts import running_hosts
from tests.servers.ray_cluster import Node, RayCluster, running_cluster
from transformers import LlamaConfig, LlamaForCausalLM

import anamorph
from anamorph.errors import AnamorphError, StreamInterrupted
from anamorph.keys import TenantKey
from anamorph.wire import completions as calls

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(600)]

VOCAB = 160
TENSOR = {"tensor_parallel": 2}
PIPELINE = {"pipeline_parallel": 2}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """Three nodes with room for one rank each: every replica of two ranks lies on two nodes."""
    folder = tmp_path_factory.mktemp("ray")
    with running_hosts() as hosts, running_cluster(folder, num_cpus=(1, 1, 1), hosts=hosts) as started:
        yield started


@pytest.fixture(scope="module")
def cluster(nodes: RayCluster) -> Cluster:
    return Cluster(cast("Any", nodes), Issuer())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096}
    special = {"eos_token_id": 3, "bos_token_id": 1, "initializer_range": 0.4}
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(LlamaConfig.from_dict({**sizes, **heads, **special})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def key() -> TenantKey:
    return TenantKey.generate("acme", "smol", 1)


@pytest.fixture(scope="module")
def replica(base: Path, key: TenantKey, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("replica") / "v1"
    anamorph.fold(base, out, key)
    return out


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=60) as client:
        yield client


@pytest.fixture
def serve(cluster: Cluster, replica: Path, key: TenantKey) -> Iterator[Callable[..., str]]:
    """Serve the replica with a layout; it is removed again."""

    def start(**fields: Any) -> str:
        anchor = {"key_id": key.id, "public_key": b64encode(key.public_key()).decode()}
        sizes = {"context_length": 4000, "num_blocks": 128, "request_timeout_s": 20}
        return cluster.serve(1, replica=str(replica), engine="torch", **anchor, **sizes, **fields)

    yield start
    cluster.remove(1)


class Client:
    """Asks in the tenant's coordinates, reads in plain ones."""

    def __init__(self, cluster: Cluster, key: TenantKey, http: httpx.Client) -> None:
        self._cluster, self._key, self._http = cluster, key, http
        self._image = key.vocab_key().permutation(VOCAB).tolist()
        self._plain = {moved: i for i, moved in enumerate(self._image)}

    def stream(self, prompt: list[int], n: int) -> Iterator[int]:
        moved = [self._image[i] for i in prompt]
        request = {"prompt": moved, "max_tokens": n, "temperature": 0, "ignore_eos": True, "stream": True}
        token, key_id = self._cluster.token(), self._key.id
        for chunk in calls.stream(self._http, self._cluster.endpoint(), request, token=token, key_id=key_id):
            yield from (self._plain[i] for choice in chunk.choices for i in choice.token_ids)

    def answers(self, prompt: list[int]) -> bool:
        try:
            return len(list(self.stream(prompt, 2))) == 2
        except AnamorphError:
            return False


@pytest.fixture
def client(cluster: Cluster, key: TenantKey, http: httpx.Client) -> Client:
    return Client(cluster, key, http)


def titled(nodes: RayCluster, title: str) -> dict[int, str]:
    """Processes of the cluster whose title holds a text, with the address of their node."""
    found = {}
    for node in nodes.nodes:
        for pid in node.pids():
            try:
                shown = " ".join(psutil.Process(pid).cmdline())
            except psutil.Error:
                continue
            if shown.startswith("ray::") and title in shown:
                found[pid] = node.address
    return found


def a_part(nodes: RayCluster) -> Node:
    """A node, not the head, that has a rank."""
    here = {*titled(nodes, "EngineRank").values(), *titled(nodes, "v1:engine").values()}
    return next(node for node in nodes.nodes[1:] if node.address in here)


def groups(nodes: RayCluster) -> list[str]:
    """Placement groups that are not removed."""
    url = f"{nodes.dashboard_url}/api/v0/placement_groups?limit=1000"
    answer = httpx.get(url, headers=nodes.headers(), timeout=30).json()
    rows = answer["data"]["result"]["result"]
    return [row["placement_group_id"] for row in rows if row["state"] != "REMOVED"]


@pytest.mark.parametrize("layout", [TENSOR, PIPELINE], ids=["tensor", "pipeline"])
def test_two_nodes_answer_what_one_process_does(
    nodes: RayCluster, base: Path, serve: Callable[..., str], client: Client, layout: dict[str, int]
) -> None:
    """Ranks on two nodes serve the encrypted replica; decrypted, it is the unsharded plaintext model's."""
    serve(**layout)
    ranks = titled(nodes, "EngineRank")
    replicas = titled(nodes, "v1:engine")
    assert (len(ranks), len(replicas)) == (1, 1)
    assert set(ranks.values()).isdisjoint(replicas.values())
    model: Any = LlamaForCausalLM.from_pretrained(base)
    for prompt in ([10, 20, 30], list(range(5, 105))):
        truth = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=-1)
        assert list(client.stream(prompt, 20)) == truth[0, len(prompt) :].tolist()


def test_a_layout_that_does_not_fit_is_refused_before_a_rank_starts(
    nodes: RayCluster, cluster: Cluster, replica: Path, key: TenantKey
) -> None:
    """Three ranks for eight heads: the deployment fails and names the number."""
    anchor = {"key_id": key.id, "public_key": b64encode(key.public_key()).decode()}
    fields: dict[str, Any] = {"replica": str(replica), "engine": "torch", "tensor_parallel": 3, **anchor}
    name = cluster.deploy(1, **fields)
    until("the refusal", lambda: cluster.state(name)["status"] == "DEPLOY_FAILED")
    message = cluster.state(name)["deployments"]["engine"]["message"]
    assert "tensor_parallel 3 does not divide num_attention_heads 8" in message
    assert titled(nodes, "EngineRank") == {}
    cluster.remove(1)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("layout", [TENSOR, PIPELINE], ids=["tensor", "pipeline"])
def test_a_lost_rank_takes_its_replica_and_both_come_back(
    nodes: RayCluster,
    serve: Callable[..., str],
    client: Client,
    layout: dict[str, int],
    how: signal.Signals,
) -> None:
    """Killed or stopped under a stream: an error event, then new processes, none of the old, one group."""
    serve(**layout)
    old = {**titled(nodes, "EngineRank"), **titled(nodes, "v1:engine")}
    (rank,) = titled(nodes, "EngineRank")
    (group,) = groups(nodes)
    stream = client.stream([10, 20, 30], 3900)
    next(stream)
    os.kill(rank, how)
    with pytest.raises(StreamInterrupted, match="the server broke off"):  # it is there, and says so
        list(stream)
    until("the replica", lambda: client.answers([1, 2, 3]) and not set(old) & set(nodes.pids()))
    assert set(groups(nodes)).isdisjoint([group])
    assert len(groups(nodes)) == 1
    assert len(titled(nodes, "EngineRank")) == 1


def test_a_killed_replica_takes_its_ranks_along(
    nodes: RayCluster, serve: Callable[..., str], client: Client
) -> None:
    """kill -9 of rank 0: the others end too, none is orphaned, and a whole new replica answers."""
    serve(**TENSOR)
    (replica,), ranks = titled(nodes, "v1:engine"), titled(nodes, "EngineRank")
    os.kill(replica, signal.SIGKILL)
    until("the end of the ranks", lambda: not set(ranks) & set(nodes.pids()))
    until("the replica", lambda: client.answers([1, 2, 3]))
    assert len(titled(nodes, "EngineRank")) == len(groups(nodes)) == 1


def test_a_lost_node_takes_the_replica_to_others(
    nodes: RayCluster, serve: Callable[..., str], client: Client
) -> None:
    """The machine of a rank dies under a stream: an error event, and a replica on the nodes that are left."""
    serve(**TENSOR)
    lost = a_part(nodes)
    stream = client.stream([10, 20, 30], 3900)
    next(stream)
    lost.kill()
    with pytest.raises(StreamInterrupted):
        list(stream)
    until("the replica", lambda: client.answers([1, 2, 3]))
    assert len(titled(nodes, "EngineRank")) == len(titled(nodes, "v1:engine")) == 1


@pytest.mark.parametrize("given_up", [False, True], ids=["for a moment", "until it is given up"])
def test_a_node_that_is_cut_off_is_replaced(
    nodes: RayCluster, serve: Callable[..., str], client: Client, given_up: bool
) -> None:
    """Its packets vanish under a stream: an error event, a replica elsewhere, nothing of the old later.

    Ray's head gives a silent machine up after a minute or so, and the replica does not wait for
    that: it may be back on other nodes while the head still counts the machine as alive. Then it
    stays a node and only what it ran of the replica ends; a node that was given up ends whole.
    """
    if nodes.hosts is None:
        pytest.skip("needs root, to make network namespaces")
    while sum(bool(node.pids()) for node in nodes.nodes) < 3:  # the head may still count a dead one
        nodes.add(1)
    serve(**TENSOR)
    lost = a_part(nodes)
    old = {pid for title in ("EngineRank", "v1:engine") for pid in titled(nodes, title)}
    stream = client.stream([10, 20, 30], 3900)
    next(stream)
    nodes.hosts.cut(lost.host)
    with pytest.raises(StreamInterrupted):
        list(stream)
    until("the replica", lambda: client.answers([1, 2, 3]), 180)
    if given_up:
        until("the head to give it up", lambda: lost.address not in nodes.alive(), 180)
    nodes.hosts.mend(lost.host)
    gone = set(lost.pids()) if given_up else old
    until("the end of what was cut off", lambda: not gone & set(nodes.pids()))
    assert len(titled(nodes, "EngineRank")) == len(titled(nodes, "v1:engine")) == len(groups(nodes)) == 1


def test_nothing_of_it_is_left(nodes: RayCluster) -> None:
    """Once the applications are deleted there is no rank, no replica and no placement group."""
    until("the end", lambda: not titled(nodes, "EngineRank") and not titled(nodes, "v1:engine"))
    until("the groups' end", lambda: groups(nodes) == [])
