"""A real Kubernetes cluster, as the tests see it: kubectl, and what they look up and wait for.

The tests need a cluster of their own: ``KUBECONFIG`` names it, and ``ANAMORPH_TEST_CLUSTER=1`` says
that everything on it may be changed. ``make test-cluster`` makes one where it can.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RELEASE, JOBS, COMPUTE = "anamorph", "anamorph-jobs", "anamorph-compute"
ZONES = (RELEASE, JOBS, COMPUTE)
Object = dict[str, Any]


@dataclass(frozen=True)
class Cluster:
    """kubectl on one cluster.

    Args:
        kubeconfig: file.
    """

    kubeconfig: Path

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        """What it prints.

        Raises:
            AssertionError: it failed, and ``check``; with what it says.
        """
        done = subprocess.run(
            ["kubectl", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "KUBECONFIG": str(self.kubeconfig)},
        )
        assert done.returncode == 0 or not check, f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done.stdout if done.returncode == 0 else done.stderr

    def get(self, *arguments: str) -> Object:
        """One object, or a list of them under ``items``."""
        found: Object = json.loads(self.kubectl("get", *arguments, "-o", "json"))
        return found

    def pods(self, namespace: str, selector: str = "") -> list[Object]:
        """Those that are not done and not going."""
        chosen = ("-l", selector) if selector else ()
        found = self.get("pods", "-n", namespace, *chosen)["items"]
        return [
            one
            for one in found
            if one["status"]["phase"] in {"Pending", "Running"} and "deletionTimestamp" not in one["metadata"]
        ]

    def pod(self, namespace: str, selector: str) -> str:
        """The name of the one that is ready."""
        ready = [one for one in self.pods(namespace, selector) if is_ready(one)]
        assert ready, f"no ready pod {selector} in {namespace}"
        return str(ready[0]["metadata"]["name"])

    def run(self, namespace: str, pod: str, *command: str, container: str | None = None) -> str:
        """What a command in a pod prints."""
        chosen = ("-c", container) if container else ()
        return self.kubectl("exec", "-n", namespace, pod, *chosen, "--", *command)

    def model(self, namespace: str, name: str = "smol") -> Object:
        return self.get("encryptedmodel", "-n", namespace, name)

    def active(self, namespace: str, name: str = "smol") -> int:
        """The active version; 0 without one."""
        return int(self.model(namespace, name).get("status", {}).get("activeVersion") or 0)

    def rotate(self, namespace: str, name: str = "smol") -> int:
        """Ask for a rotation; the version that comes."""
        before = self.active(namespace, name)
        text = f"anamorph.dev/rotate={time.time_ns()}"
        self.kubectl("annotate", "--overwrite", "-n", namespace, "encryptedmodel", name, text)
        return before + 1

    def ready(self, namespace: str) -> bool:
        """Whether every pod is."""
        return all(map(is_ready, self.pods(namespace)))


def is_ready(pod: Object) -> bool:
    """Whether it takes requests; a Job's pod does while it runs."""
    conditions = {one["type"]: one["status"] for one in pod["status"].get("conditions", [])}
    return conditions.get("Ready") == "True"


def condition(found: Object, kind: str) -> tuple[str, str]:
    """Status and reason of a condition; two empty texts without it."""
    conditions = found.get("status", {}).get("conditions", [])
    return next(((one["status"], one["reason"]) for one in conditions if one["type"] == kind), ("", ""))


def until(true: Callable[[], bool], what: str, within_s: float, every_s: float = 1.0) -> float:
    """Wait until something is so; seconds that it took.

    Raises:
        AssertionError: it is not so in time.
    """
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < within_s, f"not within {within_s:.0f} s: {what}"
        time.sleep(every_s)
    return time.monotonic() - begun
