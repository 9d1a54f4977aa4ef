"""Ranks as Ray actors: rank 0 is the replica itself, the others share its placement group.

Ray ends what it started: an actor's children die with it, and so does everything in a
placement group that is removed. What Ray cannot see, a rank that hangs, the collectives
notice, and the replica's health says so.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from anamorph.errors import SetupError
from anamorph.serve.cluster.placement import ray_resources
from anamorph.serve.engines.base import Engine
from anamorph.serve.engines.ranks.layout import Layout, bundles
from anamorph.serve.engines.ranks.process import Meeting, Part, call_meeting
from anamorph.wire.serving import EngineSettings

T = TypeVar("T")
Fetch = Callable[[EngineSettings], tuple[Path, Callable[[], None]]]


class EngineRank:
    """A rank other than the first: an actor that loads its part and takes part in every step.

    Args:
        settings: ``EngineSettings`` as a dict.
        rank: which.
        fetch: gives the verified folder of a replica on the node where it is called, and what is to be
            called after loading: it refuses a folder that has changed meanwhile.
    """

    def __init__(self, settings: dict[str, Any], rank: int, fetch: Fetch) -> None:
        self._settings = EngineSettings.model_validate(settings)
        self._rank = rank
        self._fetch = fetch

    def prepare(self) -> str:
        """Have the replica's files on this node; returns the node's id."""
        self._folder, self._check_unchanged = self._fetch(self._settings)
        return _node()

    def load(self, meeting: Meeting, share: int) -> None:
        """Meet the others and load this rank's slices; ``share`` ranks are on this node."""
        self._part = Part(self._settings, self._folder, self._rank, share)
        self._part.load(meeting, _address())
        self._check_unchanged()

    def compute(self) -> None:
        """Take part in every step; returns when rank 0 stops.

        Raises:
            RuntimeError: another rank is gone or hangs.
        """
        self._part.follow()


class Ranks:
    """All ranks of one replica but the first, as rank 0 sees them.

    Args:
        settings: of the application.
        fetch: as ``EngineRank``'s.
        group: the replica's placement group; rank ``i`` takes its ``i``-th bundle.
    """

    def __init__(self, settings: EngineSettings, fetch: Fetch, group: PlacementGroup) -> None:
        self._lost = threading.Event()
        fields = settings.model_dump(mode="json")
        self._actors = [
            _actor(settings, rank, group).remote(fields, rank, fetch)
            for rank in range(1, Layout.of(settings).ranks)
        ]

    def prepare(self) -> list[str]:
        """Let every node have the files; returns the node of each rank from 1."""
        return list(ray.get([actor.prepare.remote() for actor in self._actors]))

    def load(self, meeting: Meeting, shares: list[int], own: Callable[[], T]) -> T:
        """Let the others load while ``own`` does so here; returns what ``own`` returns.

        Raises:
            Exception: what the first that failed raised; nobody is waited for any longer.
        """
        pairs = zip(self._actors, shares, strict=True)
        others = [actor.load.remote(meeting, share).future() for actor, share in pairs]
        mine = _in_background(own)
        for done in wait([mine, *others], return_when=FIRST_EXCEPTION).done:
            done.result()
        return mine.result()

    def compute(self) -> None:
        """Let the others take part from now on; once one of them ends, ``alive`` is false."""
        computing = [actor.compute.remote() for actor in self._actors]
        threading.Thread(target=self._watch, args=(computing,), name="ranks", daemon=True).start()

    def alive(self) -> bool:
        """Whether no other rank has ended, for whatever reason."""
        return not self._lost.is_set()

    def _watch(self, computing: list[Any]) -> None:
        ray.wait(computing, num_returns=1, fetch_local=False)
        self._lost.set()


def open_ranks(settings: EngineSettings, folder: Path, fetch: Fetch) -> Engine:
    """Start the other ranks, load rank 0's part beside them and compute.

    Args:
        settings: of an application whose layout has been checked.
        folder: of the verified replica on this node.
        fetch: gives the same folder on the others' nodes, as ``EngineRank``'s.

    Raises:
        SetupError: this process is in no placement group with a bundle for each rank.
        Exception: whatever a rank raised while it loaded.
    """
    others = Ranks(settings, fetch, _group(settings))
    nodes = [_node(), *others.prepare()]
    on = Counter(nodes)
    shares = [on[node] for node in nodes]
    address = _address()
    meeting, store = call_meeting(address, len(nodes))
    part = Part(settings, folder, 0, shares[0])
    others.load(meeting, shares[1:], lambda: part.load(meeting, address, store))
    others.compute()
    return part.lead(others.alive)


def _group(settings: EngineSettings) -> PlacementGroup:
    group = ray.util.get_current_placement_group()
    needed = len(bundles(settings))
    if group is None or group.bundle_count < needed:
        raise SetupError(f"{needed} ranks need a placement group of {needed} bundles; deploy them with Serve")
    return group


def _actor(settings: EngineSettings, rank: int, group: PlacementGroup) -> Any:
    place = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=rank)
    return ray.remote(EngineRank).options(
        num_cpus=1,
        num_gpus=settings.num_gpus,
        resources=ray_resources(settings),
        max_restarts=0,
        scheduling_strategy=place,
    )


def _node() -> str:
    return str(ray.get_runtime_context().get_node_id())


def _address() -> str:
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def _in_background(work: Callable[[], T]) -> Future[T]:
    # A thread that no exit waits for: joining a group whose rank died takes as long as it takes.
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            future.set_exception(error)

    threading.Thread(target=run, name="rank 0", daemon=True).start()
    return future
