"""How each part is lost: pods without a chance to tidy up, Vault by its seal."""

from __future__ import annotations

import base64
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tests.cluster.cluster import COMPUTE, JOBS, RELEASE, Cluster
from tests.cluster.grid import Fault

Strike = Callable[[], bool]
"""Does it; whether there was anything to strike."""

_COMPONENT = "app.kubernetes.io/component"
PODS = {
    Fault.OPERATOR: (RELEASE, f"{_COMPONENT}=operator"),
    Fault.KEY_SERVICE: (RELEASE, f"{_COMPONENT}=keysvc"),
    Fault.HEAD: (COMPUTE, "ray.io/node-type=head"),
    Fault.WORKER: (COMPUTE, "ray.io/node-type=worker"),
    Fault.JOB: (JOBS, f"{_COMPONENT}=materializer"),
}
"""Namespace and selector of what is killed. Its controller makes another."""

# Seconds that Vault stays sealed: longer than what its callers wait for one answer.
SEALED_S = 15.0
_LOOK_S = 0.2


def strikes(cluster: Cluster, vault: Vault) -> Mapping[Fault, Strike]:
    """Every fault of the grid."""

    def killing(namespace: str, selector: str) -> Strike:
        return lambda: kill(cluster, namespace, selector)

    def seal() -> bool:
        try:
            vault.seal(SEALED_S)
        except httpx.TransportError:  # its port is being forwarded anew: nothing was struck
            return False
        return True

    return {Fault.VAULT: seal, **{fault: killing(*pods) for fault, pods in PODS.items()}}


def kill(cluster: Cluster, namespace: str, selector: str) -> bool:
    """Kill pods that are not done, by one call, as a step may last no longer; whether there were any."""
    said = cluster.kubectl(
        *("delete", "pod", "-n", namespace, "-l", selector),
        "--field-selector=status.phase!=Succeeded,status.phase!=Failed",
        *("--grace-period=0", "--force", "--wait=false"),
    )
    return "deleted" in said


@dataclass
class Vault:
    """A Vault that somebody else unseals again, as the evaluation profile's sidecar does.

    Args:
        ca: who signs its certificate.
        key: opens it, and so makes the token that may seal it: the evaluation profile keeps no token.
    """

    url: str
    ca: Path
    key: str = field(repr=False)

    def __post_init__(self) -> None:
        trust = ssl.create_default_context(cafile=self.ca)
        self._http = httpx.Client(base_url=f"{self.url}/v1/", verify=trust, trust_env=False, timeout=10)

    def open(self) -> None:
        """Make the token.

        Raises:
            httpx.HTTPError: it is sealed or away, or the key is not its.
        """
        self._ask("DELETE", "sys/generate-root/attempt")
        attempt = self._ask("PUT", "sys/generate-root/attempt", {})
        done = self._ask("PUT", "sys/generate-root/update", {"key": self.key, "nonce": attempt["nonce"]})
        encoded = done["encoded_token"]
        masked = base64.b64decode(encoded + "=" * (-len(encoded) % 4))
        pairs = zip(masked, attempt["otp"].encode(), strict=True)
        self._http.headers["X-Vault-Token"] = bytes(a ^ b for a, b in pairs).decode()

    def sealed(self) -> bool:
        """Whether it is."""
        return bool(self._ask("GET", "sys/seal-status")["sealed"])

    def seal(self, for_s: float) -> None:
        """Seal it, and again as soon as somebody has unsealed it, for so many seconds.

        Raises:
            httpx.HTTPError: it was sealed or away already, or the token is void.
        """
        end = time.monotonic() + for_s
        self._ask("PUT", "sys/seal")
        while time.monotonic() < end:
            time.sleep(_LOOK_S)
            # For a moment after it is unsealed it leads nothing and refuses: the next look does it.
            with suppress(httpx.HTTPError):
                if not self.sealed():
                    self._ask("PUT", "sys/seal")

    def close(self) -> None:
        """Void the token, if there is one, and end the connections."""
        with closing(self._http):
            if "X-Vault-Token" in self._http.headers:
                self._ask("POST", "auth/token/revoke-self")

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        answer = self._http.request(method, path, json=body)
        answer.raise_for_status()
        return answer.json() if answer.content else {}
