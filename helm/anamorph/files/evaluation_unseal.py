"""Keeps the evaluation profile's Vault initialised, unsealed and set up.

NOT FOR PRODUCTION. The unseal key lies in a Secret, so whoever reads Secrets of this namespace opens Vault:
the one exception to the rule that no key material is in an object of the cluster. No token stays anywhere:
the one that sets Vault up is made from the unseal key, used, and revoked.
"""

from __future__ import annotations

import argparse
import base64
import logging
import os
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from kubernetes import client, config

KEY = "unseal-key"
PAUSE_S = 2
_log = logging.getLogger("unsealer")


@dataclass
class Unsealer:
    """One Vault and the Secret with its key; ``set_up`` is given a root token."""

    vault: httpx.Client
    secrets: Any
    namespace: str
    name: str
    set_up: Callable[[str], None]
    _root: str = field(default="", repr=False)
    _ready: bool = False

    def turn(self) -> bool:
        """Do what is to be done now; whether Vault is open and set up."""
        status = self._call("GET", "seal-status")
        if not status["initialized"]:
            self._initialise()
        elif status["sealed"]:
            self._call("PUT", "unseal", {"key": self._key()})
            _log.info("unsealed")
        elif not self._ready:
            self._set_up()
        return self._ready and not status["sealed"]

    def _initialise(self) -> None:
        made = self._call("PUT", "init", {"secret_shares": 1, "secret_threshold": 1})
        [key] = made["keys_base64"]
        # Until this is written the key is here alone: nothing may come in between.
        body = {"stringData": {KEY: key}}
        while True:
            try:
                self.secrets.patch_namespaced_secret(self.name, self.namespace, body)
                break
            except Exception as error:  # noqa: BLE001 - whatever it is, the key must not be lost
                _log.warning("the unseal key cannot be written yet: %s", type(error).__name__)
                time.sleep(PAUSE_S)
        self._root = made["root_token"]
        _log.info("initialised; the unseal key is in Secret %s", self.name)

    def _key(self) -> str:
        data = self.secrets.read_namespaced_secret(self.name, self.namespace).data or {}
        return base64.b64decode(data[KEY]).decode()

    def _set_up(self) -> None:
        token = self._root or self._generated_root()
        self.set_up(token)
        headers = {"X-Vault-Token": token}
        self.vault.post("/v1/auth/token/revoke-self", headers=headers).raise_for_status()
        self._root, self._ready = "", True
        _log.info("set up")

    def _generated_root(self) -> str:
        self.vault.delete("/v1/sys/generate-root/attempt").raise_for_status()
        attempt = self._call("PUT", "generate-root/attempt", {})
        done = self._call("PUT", "generate-root/update", {"key": self._key(), "nonce": attempt["nonce"]})
        encoded = done["encoded_token"]
        masked = base64.b64decode(encoded + "=" * (-len(encoded) % 4))
        return bytes(a ^ b for a, b in zip(masked, attempt["otp"].encode(), strict=True)).decode()

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        answer = self.vault.request(method, f"/v1/sys/{path}", json=body)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json() if answer.content else {}
        return found


def set_up(settings: Path, token: str) -> None:
    """Run ``vault setup``; the token is in a file of memory for as long as that takes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "token"
        file.touch(0o600)
        file.write_text(token)
        command = [
            "anamorph-keysvc",
            "vault",
            "setup",
            "--settings",
            str(settings),
            "--token-file",
            str(file),
        ]
        subprocess.run(command, check=True, timeout=120)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--settings", type=Path, required=True)
    parser.add_argument("--namespace", required=True)
    parser.add_argument("--secret", required=True)
    chosen = parser.parse_args()
    os.umask(0o077)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    config.load_incluster_config()
    settings = tomllib.loads(chosen.settings.read_text())
    trust = httpx.create_ssl_context(verify=settings["ca_file"], trust_env=False)
    with httpx.Client(base_url=settings["address"], verify=trust, trust_env=False, timeout=10) as vault:
        secrets = client.CoreV1Api()
        keeper = Unsealer(
            vault, secrets, chosen.namespace, chosen.secret, lambda token: set_up(chosen.settings, token)
        )
        while True:
            try:
                keeper.turn()
            except (httpx.HTTPError, client.ApiException, subprocess.SubprocessError, KeyError) as error:
                # Names only: an answer of Vault could hold what must be in no log.
                _log.warning("not yet: %s", type(error).__name__)
            time.sleep(PAUSE_S)


if __name__ == "__main__":
    main()
