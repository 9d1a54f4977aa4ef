"""Whether something fits on a cluster, and why not, in words: decided before it is asked for.

A pure function over what Ray's nodes have in all and what has been placed. Ray holds to the
same numbers when it places: an application requests its CPUs, GPUs and, where nodes
announce it, its share of ``MEMORY``.

A node announces the memory that replicas may take there, of its devices or, for engines
on the CPU, of the host: ``ray start --resources '{"anamorph_memory_mib": 80000}'``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from anamorph.wire.serving import EngineSettings, PoolSettings

MEMORY = "anamorph_memory_mib"
# Nodes that a reason lists one by one.
LISTED = 4


@dataclass(frozen=True)
class Room:
    """Logical CPUs, GPUs and MiB: of a node, or what one rank needs.

    ``memory_mib`` of a node is ``None`` where it announces none: then only Ray's other
    resources bound what it takes.
    """

    cpus: float
    gpus: float = 0
    memory_mib: int | None = None

    def takes(self, wanted: Room) -> bool:
        """Whether ``wanted`` fits beside what has been taken."""
        memory = self.memory_mib is None or (wanted.memory_mib or 0) <= self.memory_mib
        return memory and wanted.cpus <= self.cpus + 1e-6 and wanted.gpus <= self.gpus + 1e-6

    def less(self, taken: Room) -> Room:
        """What is left."""
        memory = None if self.memory_mib is None else self.memory_mib - (taken.memory_mib or 0)
        return Room(self.cpus - taken.cpus, self.gpus - taken.gpus, memory)

    def __str__(self) -> str:
        memory = [] if self.memory_mib is None else [f"{self.memory_mib:,} MiB"]
        return " and ".join([*memory, f"{self.gpus:g} GPUs", f"{self.cpus:g} CPUs"])


@dataclass(frozen=True)
class Node:
    """One machine of the cluster, with all that it has."""

    name: str
    room: Room


@dataclass(frozen=True)
class Demand:
    """What an application takes: ``ranks`` times ``each``, all ranks of its replicas together."""

    app: str
    each: Room
    ranks: int = 1


@dataclass(frozen=True)
class Fits:
    """Where each rank would go, by node name; Ray may choose otherwise."""

    nodes: tuple[str, ...]


@dataclass(frozen=True)
class DoesNotFit:
    """Why not, with numbers."""

    reason: str


def fits(cluster: Sequence[Node], placed: Iterable[Demand], wanted: Demand) -> Fits | DoesNotFit:
    """Whether ``wanted`` fits beside what is placed: largest first, each rank where it first fits.

    Args:
        cluster: nodes that are alive.
        placed: applications that stand or are about to.
        wanted: another one.
    """
    left = left_over(cluster, placed)
    nodes: list[str] = []
    for _ in range(wanted.ranks):
        name = next((name for name, room in left.items() if room.takes(wanted.each)), None)
        if name is None:
            return DoesNotFit(_reason(cluster, left, wanted, len(nodes)))
        left[name] = left[name].less(wanted.each)
        nodes.append(name)
    return Fits(tuple(nodes))


def left_over(cluster: Sequence[Node], placed: Iterable[Demand]) -> dict[str, Room]:
    """What each node has left when everything is placed as ``fits`` would, by node name."""
    announced = not without_memory(cluster)
    left = {node.name: _for_replicas(node.room) if announced else node.room for node in cluster}
    for demand in sorted(placed, key=_size, reverse=True):
        for _ in range(demand.ranks):
            # What stands somewhere although it does not fit by these numbers counts against the fullest.
            fitting = (name for name, room in left.items() if room.takes(demand.each))
            name = next(fitting, next(iter(left), None))
            if name is not None:
                left[name] = left[name].less(demand.each)
    return left


def _size(demand: Demand) -> tuple[float, int, float]:
    return demand.each.gpus, demand.each.memory_mib or 0, demand.each.cpus


def _reason(cluster: Sequence[Node], left: dict[str, Room], wanted: Demand, done: int) -> str:
    if not cluster:
        return f"{wanted.app} needs {wanted.each}: the cluster has no node"
    ranks = "" if wanted.ranks == 1 else f" for each of {wanted.ranks} ranks ({done} found a place)"
    listed = [f"{node.name} has {left[node.name]} left of {node.room}" for node in cluster[:LISTED]]
    more = [] if len(cluster) <= LISTED else [f"and {len(cluster) - LISTED} more nodes have less than that"]
    return f"{wanted.app} needs {wanted.each}{ranks}; " + "; ".join([*listed, *more])


def demand_of(app: str, settings: EngineSettings | PoolSettings, *, waking: bool = False) -> Demand:
    """What an application reserves, as its settings say.

    Args:
        app: its name.
        settings: its arguments.
        waking: what one replica takes, also of an application that is asleep. Without it, what
            it takes at all times: of one that may sleep, nothing.
    """
    each = reserved(settings)
    if isinstance(settings, PoolSettings):
        return Demand(app, each)
    replicas = max(1, settings.autoscaling.min_replicas) if waking else settings.autoscaling.min_replicas
    ranks = 1 if settings.engine == "fake" else settings.tensor_parallel * settings.pipeline_parallel
    return Demand(app, each, ranks * replicas)


def reserved(settings: EngineSettings | PoolSettings) -> Room:
    """What Ray reserves for one rank."""
    return Room(0.1 if settings.engine == "fake" else 1, settings.num_gpus, settings.memory_mib or None)


def ray_resources(settings: EngineSettings | PoolSettings) -> dict[str, float]:
    """The custom resources of one rank: none where its memory is not known or not announced."""
    return {MEMORY: settings.memory_mib} if settings.memory_mib else {}


def without_memory(cluster: Sequence[Node]) -> bool:
    """Whether no node announces memory; then nobody may request it either, or would wait for good."""
    return all(node.room.memory_mib is None for node in cluster)


def nodes_of(answer: Mapping[str, Any]) -> tuple[Node, ...]:
    """The nodes that are alive, from the answer of Ray's dashboard to ``GET /api/v0/nodes``."""
    listed = answer["data"]["result"]["result"]
    return tuple(_node(found) for found in listed if found["state"] == "ALIVE")


def _node(found: Mapping[str, Any]) -> Node:
    has = found["resources_total"]
    memory = has.get(MEMORY)
    room = Room(has.get("CPU", 0), has.get("GPU", 0), None if memory is None else int(memory))
    return Node(f"{found['node_ip']}/{found['node_id'][:6]}", room)


def _for_replicas(room: Room) -> Room:
    """Beside nodes that announce memory, one that announces none has none to give."""
    return replace(room, memory_mib=room.memory_mib or 0)
