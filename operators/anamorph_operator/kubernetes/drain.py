"""What must happen before the operator is taken away: ``python -m anamorph_operator.kubernetes.drain``.

Objects that are being deleted are waited for, as long as the operator is there to remove them. Then it is
stopped, so that it adds no finalizer again, and our finalizers come off everything that is left: without an
operator nobody else would ever remove them, and a namespace with such an object could not be deleted. The
objects stay, and so do the key service's records: an operator that comes back takes them up.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from kubernetes import client, config

from anamorph_operator.kubernetes.resources.definition import KINDS, Kind
from anamorph_operator.kubernetes.resources.part import GROUP, VERSION

_PAUSE_S = 1.0
_STOP_S = 120.0

Object = dict[str, Any]


@dataclass
class Drain:
    """One draining.

    Args:
        namespace, deployment: of the operator.
        say: tells people what happens.
        clock, sleep: time in seconds.
    """

    api: client.ApiClient
    namespace: str
    deployment: str
    say: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def run(self, wait_s: float) -> None:
        """Wait at most ``wait_s`` for what is being deleted, stop the operator, take finalizers off.

        Raises:
            ApiException: the API server refuses; doing it again goes on where it ended.
            TimeoutError: the operator's pods do not end.
        """
        self._until(lambda: not self._going(), wait_s)
        for kind, found in self._going():
            self.say(
                f"{kind.name} {_name(found)} is still being deleted: it goes without its replicas' removal"
            )
        self._stop()
        for kind in KINDS:
            for found in self._objects(kind):
                self._release(kind, found)

    def _going(self) -> list[tuple[Kind, Object]]:
        everything = ((kind, found) for kind in KINDS for found in self._objects(kind))
        return [(kind, found) for kind, found in everything if "deletionTimestamp" in found["metadata"]]

    def _objects(self, kind: Kind) -> list[Object]:
        listing = client.CustomObjectsApi(self.api).list_cluster_custom_object(GROUP, VERSION, kind.plural)
        return list(listing["items"])

    def _stop(self) -> None:
        scale = {"spec": {"replicas": 0}}
        client.AppsV1Api(self.api).patch_namespaced_deployment_scale(self.deployment, self.namespace, scale)
        if not self._until(self._stopped, _STOP_S):
            raise TimeoutError(
                f"pods of {self.namespace}/{self.deployment} do not end: look at them, then run this again"
            )
        self.say("the operator is stopped")

    def _stopped(self) -> bool:
        # Those that are ending still work.
        deployment = client.AppsV1Api(self.api).read_namespaced_deployment(self.deployment, self.namespace)
        selector = ",".join(f"{key}={value}" for key, value in deployment.spec.selector.match_labels.items())
        return (
            not client.CoreV1Api(self.api).list_namespaced_pod(self.namespace, label_selector=selector).items
        )

    def _release(self, kind: Kind, found: Object) -> None:
        metadata = found["metadata"]
        ours = [one for one in metadata.get("finalizers", []) if one.startswith(f"{GROUP}/")]
        if not ours:
            return
        left = [one for one in metadata["finalizers"] if one not in ours]
        # With the version that was read: somebody else's finalizer that came meanwhile must stay.
        patch = {"metadata": {"finalizers": left, "resourceVersion": metadata["resourceVersion"]}}
        client.CustomObjectsApi(self.api).patch_namespaced_custom_object(
            GROUP, VERSION, metadata["namespace"], kind.plural, metadata["name"], patch
        )
        self.say(f"{kind.name} {_name(found)}: finalizer taken off")

    def _until(self, done: Callable[[], bool], at_most_s: float) -> bool:
        end = self.clock() + at_most_s
        while not done():
            if self.clock() >= end:
                return False
            self.sleep(_PAUSE_S)
        return True


def _name(found: Object) -> str:
    return f"{found['metadata']['namespace']}/{found['metadata']['name']}"


def main(
    namespace: Annotated[str, typer.Option(help="Namespace of the operator.")],
    deployment: Annotated[str, typer.Option(help="Deployment of the operator.")],
    wait: Annotated[float, typer.Option(help="Seconds to wait for what is being deleted.", min=0)] = 120,
) -> None:
    """Take our finalizers off every object, before the operator goes."""
    config.load_incluster_config()
    with client.ApiClient() as api:
        try:
            Drain(api, namespace, deployment, typer.echo).run(wait)
        except (client.ApiException, TimeoutError) as error:
            typer.echo(f"error: {error}", err=True)
            sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
