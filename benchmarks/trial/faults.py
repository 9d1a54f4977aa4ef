"""What can go wrong at a site: each fault strikes, lasts, and is repaired as it would be in production."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import psutil
from benchmarks.trial.site import KEYSVC, NODE_CPUS, OPERATOR, Site, kill, pause, resume

Repair = Callable[[], None]
Strike = Callable[[Site, np.random.Generator], Repair]
# How long a paused node may take to be counted again, before it is replaced as a dead one.
REJOIN_S = 30.0


@dataclass(frozen=True)
class Fault:
    """One kind.

    Args:
        name: what is struck, and how.
        strike: does the harm, and returns what repairs it.
    """

    name: str
    strike: Strike


def _nothing() -> None:
    """Ray repairs it by itself."""


class NothingToStrike(Exception):
    """There is no such process at the moment."""


def _process(title: str, site: Site, source: np.random.Generator) -> list[psutil.Process]:
    found = site.workers(title)
    if not found:
        raise NothingToStrike(title)
    return [found[int(source.integers(len(found)))]]


def _kill_worker(title: str, site: Site, source: np.random.Generator) -> Repair:
    kill(_process(title, site, source))
    return _nothing


def _pause_worker(title: str, site: Site, source: np.random.Generator) -> Repair:
    paused = _process(title, site, source)
    pause(paused)
    return partial(resume, paused)


def _kill_component(name: str, site: Site, source: np.random.Generator) -> Repair:  # noqa: ARG001 -- as all
    command = site.kill(name)
    return lambda: site.restart(name, command)


def _pause_component(name: str, site: Site, source: np.random.Generator) -> Repair:  # noqa: ARG001 -- as all
    paused = [psutil.Process(site.process(name).pid)]
    pause(paused)
    return partial(resume, paused)


def _kill_node(site: Site, source: np.random.Generator) -> Repair:  # noqa: ARG001 -- as all
    site.worker_node.kill()
    return partial(_replace_node, site)


def _pause_node(site: Site, source: np.random.Generator) -> Repair:  # noqa: ARG001 -- as all
    """Frozen, as a machine is whose network is cut: its head counts it as dead after a while."""
    node = site.worker_node
    node.signal(signal.SIGSTOP)

    def repair() -> None:
        node.signal(signal.SIGCONT)
        end = time.monotonic() + REJOIN_S
        while time.monotonic() < end:
            time.sleep(1)
            if not node.pids():
                break
            if node.address in site.cluster.alive():
                return
        node.kill()
        _replace_node(site)

    return repair


def _replace_node(site: Site) -> None:
    site.cluster.add(NODE_CPUS)


def _kill_store(site: Site, source: np.random.Generator) -> Repair:  # noqa: ARG001 -- as all
    site.store.kill()
    return site.store.start


def _pause_store(site: Site, source: np.random.Generator) -> Repair:  # noqa: ARG001 -- as all
    paused = [psutil.Process(site.store.program.pid)]
    pause(paused)
    return partial(resume, paused)


def _cut(link: str, how: str, site: Site, source: np.random.Generator) -> Repair:  # noqa: ARG001 -- as all
    fault = site.serve_link if link == "serve" else site.keysvc_link
    getattr(fault, how)()
    return fault.heal


_WORKERS = {
    "replica": "ray::ServeReplica:",
    "rank": "ray::EngineRank",
    "controller": "ray::ServeController",
    "ray-proxy": "ray::ProxyActor",
}
FAULTS: tuple[Fault, ...] = (
    *(Fault(f"{name}: kill -9", partial(_kill_worker, title)) for name, title in _WORKERS.items()),
    *(Fault(f"{name}: SIGSTOP", partial(_pause_worker, title)) for name, title in _WORKERS.items()),
    *(Fault(f"{name}: kill -9", partial(_kill_component, name)) for name in (KEYSVC, OPERATOR)),
    *(Fault(f"{name}: SIGSTOP", partial(_pause_component, name)) for name in (KEYSVC, OPERATOR)),
    Fault("node: kill -9", _kill_node),
    Fault("node: SIGSTOP", _pause_node),
    Fault("store: kill -9", _kill_store),
    Fault("store: SIGSTOP", _pause_store),
    Fault("network to Serve: cut", partial(_cut, "serve", "cut")),
    Fault("network to Serve: silent", partial(_cut, "serve", "hang")),
    Fault("network to the key service: cut", partial(_cut, "keysvc", "cut")),
    Fault("network to the key service: silent", partial(_cut, "keysvc", "hang")),
)


@dataclass(frozen=True)
class Struck:
    """A fault as it happened; seconds on the monotonic clock."""

    name: str
    at: float
    repaired: float


@contextmanager
def struck(fault: Fault, site: Site, source: np.random.Generator, into: list[Struck]) -> Iterator[None]:
    """The harm is done inside and repaired at the end, whatever happens inside.

    Raises:
        NothingToStrike: there is no such process; nothing was done.
    """
    at = time.monotonic()
    repair = fault.strike(site, source)
    try:
        yield
    finally:
        repair()
        into.append(Struck(fault.name, at, time.monotonic()))


def sequence(names: Sequence[Fault], source: np.random.Generator) -> Iterator[Fault]:
    """Every fault in random order, then every fault in another, for ever: none is left to chance."""
    while True:
        for index in source.permutation(len(names)):
            yield names[int(index)]
