"""Whether bytes that nobody may write down lie somewhere in the cluster."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.cluster.cluster import Cluster

_ENVIRON = "cat /proc/[0-9]*/environ 2>/dev/null || true"


def spellings(secret: bytes) -> re.Pattern[bytes]:
    """The bytes as they are, in hexadecimal, and in base64 wherever they begin in a longer text."""
    found = {re.escape(secret), secret.hex().encode(), secret.hex().upper().encode()}
    for before in range(3):
        for alphabet in (base64.b64encode, base64.urlsafe_b64encode):
            # The first and the last characters depend on what stands beside.
            text = alphabet(bytes(before) + secret)
            found.add(re.escape(text[-(-before * 8 // 6) : (before + len(secret)) * 8 // 6]))
    return re.compile(b"|".join(sorted(found)))


def places(cluster: Cluster, etcd: Path) -> Iterator[tuple[str, bytes]]:
    """All that the cluster keeps or shows: objects, logs, environments, etcd's files.

    Args:
        etcd: its data folder.
    """
    kinds = cluster.kubectl("api-resources", "--verbs=list", "-o", "name").split()
    for kind in kinds:
        yield f"objects {kind}", cluster.kubectl("get", kind, "-A", "-o", "yaml", check=False).encode()
    for pod in cluster.get("pods", "-A")["items"]:
        yield from _of_pod(cluster, pod["metadata"]["namespace"], pod["metadata"]["name"], pod)
    for path in sorted(etcd.rglob("*")):
        if path.is_file():
            yield f"etcd {path.name}", path.read_bytes()


def _of_pod(
    cluster: Cluster, namespace: str, name: str, pod: dict[str, object]
) -> Iterator[tuple[str, bytes]]:
    where = f"{namespace}/{name}"
    for previous in ((), ("--previous",)):
        command = ("logs", "-n", namespace, name, "--all-containers", *previous)
        yield f"log of {where} {''.join(previous)}", cluster.kubectl(*command, check=False).encode()
    spec = pod["spec"]
    assert isinstance(spec, dict)
    for container in (one["name"] for one in spec["containers"]):
        command = ("exec", "-n", namespace, name, "-c", container, "--", "sh", "-c", _ENVIRON)
        yield f"environment of {where} {container}", cluster.kubectl(*command, check=False).encode()


def hits(cluster: Cluster, etcd: Path, secrets: Iterable[bytes]) -> list[str]:
    """Where one of them is."""
    patterns = [spellings(secret) for secret in secrets]
    return [place for place, content in places(cluster, etcd) if any(one.search(content) for one in patterns)]
