"""What all parts of the driver see: resources as they are watched, and each cluster's last turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from anamorph_operator.actions import Hold
from anamorph_operator.kubernetes.assignment import Assignment, Key, Places
from anamorph_operator.kubernetes.build.serve_config import serve_url
from anamorph_operator.kubernetes.catalogue import Object
from anamorph_operator.kubernetes.options import Site
from anamorph_operator.kubernetes.resources.admission import bound
from anamorph_operator.kubernetes.resources.objects import EncryptedModel, ServingCluster
from anamorph_operator.kubernetes.resources.part import GROUP, VERSION, Part
from anamorph_operator.reconciler import Reconciler, Turn


@dataclass(frozen=True)
class Watched:
    """A resource and the ``resourceVersion`` that it was seen at."""

    of: EncryptedModel | ServingCluster
    version: str


@dataclass
class View:
    """Nothing in it is kept anywhere else, and nothing is lost with it.

    Args:
        site: what the operator was started with.
        models: every ``EncryptedModel``.
        clusters: every ``ServingCluster`` of the compute namespace.
        annotations: of a namespace, by its name; none of one that is not there.
    """

    site: Site
    models: Callable[[], Iterable[Watched]] = tuple
    clusters: Callable[[], Iterable[Watched]] = tuple
    annotations: Callable[[str], Mapping[str, str]] = lambda _: {}
    reconcilers: dict[str, Reconciler] = field(default_factory=dict)
    assignments: dict[str, Assignment] = field(default_factory=dict)
    wakes: dict[str, asyncio.Event] = field(default_factory=dict)

    def wake(self, name: str | None = None) -> None:
        """End the pause of one loop, or of all."""
        for known, event in self.wakes.items():
            if name in (None, known):
                event.set()

    def waking(self, name: str) -> asyncio.Event:
        """The event that ends a loop's pause."""
        return self.wakes.setdefault(name, asyncio.Event())

    def resources(self) -> list[EncryptedModel]:
        """Every ``EncryptedModel``, those that are being deleted too."""
        return [seen.of for seen in self.models() if isinstance(seen.of, EncryptedModel)]

    def bound(self, resource: EncryptedModel) -> bool:
        """Whether its namespace may name its tenant, as the admission policy has it."""
        return bound(self.annotations(resource.metadata.namespace), resource.tenant)

    def places(self) -> Places:
        """Where clients reach each cluster."""
        clusters = (seen.of for seen in self.clusters() if isinstance(seen.of, ServingCluster))
        return {cluster.name: self.public_url(cluster) for cluster in clusters}

    def public_url(self, cluster: ServingCluster) -> str:
        """Where clients reach a cluster."""
        return cluster.spec.public_url or self.serve_url(cluster)

    def serve_url(self, cluster: ServingCluster) -> str:
        """Where the operator reaches it."""
        return serve_url(cluster.name, cluster.spec, self.site.compute)

    def turn(self, cluster: str) -> Turn | None:
        """A cluster's last turn."""
        reconciler = self.reconcilers.get(cluster)
        return None if reconciler is None else reconciler.last

    def held(self) -> dict[Key, str]:
        """Models whose version waits for room, with the reason."""
        turns = [self.turn(name) for name in self.reconcilers]
        decided = (action for turn in turns if turn is not None for action in turn.decided)
        holds = (action for action in decided if isinstance(action, Hold))
        return {(hold.ref.tenant, hold.ref.model): hold.reason for hold in holds}


def status_of(seen: Watched, kind: str, status: Part) -> Object:
    """A status as it is applied: at the very version that it was computed from."""
    metadata = seen.of.metadata
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": kind,
        "metadata": {
            "name": metadata.name,
            "namespace": metadata.namespace,
            "resourceVersion": seen.version,
        },
        "status": status.manifest(),
    }
