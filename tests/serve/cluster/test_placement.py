"""The planner: what it lets in fits by Ray's own numbers, and what it refuses it can explain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anamorph.serve.cluster.placement import (
    MEMORY,
    Demand,
    DoesNotFit,
    Fits,
    Node,
    Room,
    demand_of,
    fits,
    left_over,
    nodes_of,
    ray_resources,
)
from anamorph.serve.cluster.sizing import PROCESS_MIB, Size, read_size
from anamorph.wire.admin import Autoscaling
from anamorph.wire.serving import EngineSettings, PoolSettings

ROOMS = st.builds(Room, st.integers(0, 8), st.integers(0, 4), st.none() | st.integers(0, 1000))
NODES = st.lists(ROOMS, max_size=4).map(lambda rooms: [Node(f"n{i}", r) for i, r in enumerate(rooms)])
DEMANDS = st.builds(
    Demand,
    st.just("app"),
    st.builds(Room, st.just(1), st.integers(0, 2), st.integers(1, 500)),
    st.integers(1, 3),
)


@given(NODES, st.lists(DEMANDS, max_size=4), DEMANDS)
def test_what_fits_takes_no_more_than_there_is(
    cluster: list[Node], placed: list[Demand], wanted: Demand
) -> None:
    """Every rank has its node, and no node gives what it has not left beside what is placed."""
    verdict = fits(cluster, placed, wanted)
    if isinstance(verdict, DoesNotFit):
        assert "app needs" in verdict.reason
        return
    assert len(verdict.nodes) == wanted.ranks
    left = left_over(cluster, placed)
    for name in verdict.nodes:
        assert left[name].takes(wanted.each)
        left[name] = left[name].less(wanted.each)


@given(NODES, st.lists(DEMANDS, max_size=4), DEMANDS)
def test_what_fits_beside_others_fits_alone(
    cluster: list[Node], placed: list[Demand], wanted: Demand
) -> None:
    """So that giving up for good what does not fit on an empty cluster is never wrong."""
    if isinstance(fits(cluster, placed, wanted), Fits):
        assert isinstance(fits(cluster, (), wanted), Fits)


def test_a_rotation_needs_room_for_two() -> None:
    """16 GiB hold one version of 10, not two; the reason has the numbers."""
    cluster = [Node("a", Room(8, 1, 16_384))]
    version = Demand("acme.smol.v2", Room(1, 0, 10_240))
    assert fits(cluster, (), version) == Fits(("a",))
    verdict = fits(cluster, [Demand("acme.smol.v1", Room(1, 0, 10_240))], version)
    assert isinstance(verdict, DoesNotFit)
    for words in ("acme.smol.v2 needs 10,240 MiB", "a has 6,144 MiB", "left of 16,384 MiB"):
        assert words in verdict.reason


def test_ranks_may_lie_on_several_nodes() -> None:
    """Two of three GPUs on one node, one on the next; a fourth has no place, and the reason says how far."""
    cluster = [Node("a", Room(8, 2)), Node("b", Room(8, 1))]
    each = Room(1, 1)
    assert fits(cluster, (), Demand("x", each, 3)) == Fits(("a", "a", "b"))
    verdict = fits(cluster, (), Demand("x", each, 4))
    assert isinstance(verdict, DoesNotFit)
    assert "4 ranks (3 found a place)" in verdict.reason


def test_memory_binds_only_where_nodes_announce_it() -> None:
    """On a machine that announces none it stops nobody; beside nodes that do, one without has none."""
    wanted = Demand("x", Room(1, 0, 100))
    silent = Node("silent", Room(8))
    assert isinstance(fits([silent], (), wanted), Fits)
    assert isinstance(fits([silent, Node("full", Room(8, 0, 99))], (), wanted), DoesNotFit)
    assert isinstance(fits([], (), wanted), DoesNotFit)


def settings(**fields: Any) -> EngineSettings:
    return EngineSettings.model_validate(
        {"tenant": "acme", "model": "m", "version": 1, "replica": "r", "context_length": 9, **fields}
    )


def test_an_application_demands_what_ray_reserves_for_it() -> None:
    """All ranks of all replicas that are always there; one that may sleep only when it is awake."""
    sharded = settings(tensor_parallel=2, pipeline_parallel=2, num_gpus=1, memory_mib=50)
    assert demand_of("x", sharded) == Demand("x", Room(1, 1, 50), 4)
    assert ray_resources(sharded) == {MEMORY: 50}
    asleep = settings(autoscaling=Autoscaling(min_replicas=0, max_replicas=3), engine="fake")
    assert demand_of("x", asleep).ranks == 0
    assert demand_of("x", asleep, waking=True) == Demand("x", Room(0.1), 1)
    assert ray_resources(asleep) == {}
    assert demand_of("p", PoolSettings(pool="p", context_length=9)) == Demand("p", Room(1), 1)


def test_nodes_are_read_as_ray_tells_them() -> None:
    """The dead ones are left out; memory only where it is announced."""
    alive = {"state": "ALIVE", "node_ip": "10.0.0.1", "node_id": "abcdef0123"}
    dead = {"state": "DEAD", "node_ip": "10.0.0.2", "node_id": "00", "resources_total": {}}
    has = {"CPU": 4.0, "GPU": 2.0, MEMORY: 1000.0, "memory": 1e9}
    answer = {"data": {"result": {"result": [{**alive, "resources_total": has}, dead]}}}
    assert nodes_of(answer) == (Node("10.0.0.1/abcdef", Room(4, 2, 1000)),)


CONFIG = {
    "dtype": "bfloat16",
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def test_a_size_counts_weights_head_and_cache(tmp_path: Path) -> None:
    """By hand: 4 MiB as stored, an untied head of 1000 × 64, and 2·3·2·16 numbers a token."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 2**22)
    stored, wide = read_size(tmp_path), read_size(tmp_path, "float32")
    assert stored == Size(2**22 + 1000 * 64 * 2, 2 * 3 * 2 * 16 * 2)
    assert wide == Size(2 * stored.weights, 2 * stored.token)
    assert stored.mib(num_blocks=512) == PROCESS_MIB + -(-(stored.weights + 512 * 32 * stored.token) // 2**20)
    assert stored.mib(num_blocks=512, ranks=2) < stored.mib(num_blocks=512)
    assert (
        stored.mib(num_blocks=512, copies=4)
        > 4 * (stored.mib(num_blocks=512) - PROCESS_MIB) - 4 + PROCESS_MIB
    )


@pytest.mark.parametrize("text", [None, "[]", "{"])
def test_a_folder_that_tells_nothing_has_no_size(tmp_path: Path, text: str | None) -> None:
    """It is unknown rather than guessed."""
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").write_bytes(b"0")
    assert read_size(tmp_path) is None
