"""What callers notice while Vault is sealed for minutes, and how soon a waiting rotation goes on afterwards.

    python benchmarks/keysvc_outage.py [--minutes 3] [--json FILE]

Two processes of the service over PostgreSQL and Vault. One model's root is open when Vault is
sealed; until it is unsealed, its key is released once a second, an inference token is issued,
and a rotation of another model is asked for at the start. Needs PostgreSQL and Vault.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.servers.postgres import running_postgres  # noqa: E402 -- the checkout, not a package
from tests.servers.production import Production, running_production  # noqa: E402 -- as above
from tests.servers.vault import running_vault  # noqa: E402 -- as above

from anamorph.cli.machine.signals import end_as_interrupt  # noqa: E402 -- as above
from anamorph.errors import ServiceError  # noqa: E402 -- as above
from anamorph.wire.admin import (  # noqa: E402 -- as above
    ApiKeyCreate,
    Materialized,
    ModelCreate,
    Probe,
    Role,
    TenantCreate,
)
from anamorph.wire.keyservice import KeyService  # noqa: E402 -- as above

ARTIFACT = Materialized(replica="r", manifest_sha256="0" * 64, probe=Probe(prompts=((1,),), expected=((2,),)))


def staged(url: str, platform: KeyService, admin: KeyService) -> None:
    """Two models of a tenant; the first has a version in STAGED."""
    for model in ("open", "waiting"):
        admin.create_model("acme", ModelCreate(id=model, base="b", vocab_size=50, context_length=64))
    admin.rotate("acme", "open")
    with KeyService(url, platform.materialize("acme", "open", 1).secret) as job:
        job.release("acme", "open", 1, "materialize")
        job.stage("acme", "open", 1, ARTIFACT)


def endure(made: Production, client: KeyService, admin: KeyService, seconds: float) -> dict[str, Any]:
    """Seal, ask until the time is over, unseal, and wait for the rotation."""
    made.vault.seal()
    admin.rotate("acme", "waiting")
    asked, failed, slowest, ends_at = 0, [], 0.0, time.monotonic() + seconds
    while time.monotonic() < ends_at:
        for call in (
            lambda: client.release("acme", "open", 1, "client"),
            lambda: client.inference_token("acme", "open"),
        ):
            began = time.monotonic()
            try:
                call()
            except ServiceError as error:
                failed.append(error.code)
            asked, slowest = asked + 1, max(slowest, time.monotonic() - began)
        time.sleep(1)
    made.vault.unseal()
    began = time.monotonic()
    while admin.get_version("acme", "waiting", 1).key_id is None:
        time.sleep(0.1)
    return {
        "sealed_s": seconds,
        "asked": asked,
        "failed": failed,
        "slowest_s": round(slowest, 2),
        "rotation_goes_on_after_s": round(time.monotonic() - began, 1),
    }


def main() -> None:
    """Set up, endure, print."""
    end_as_interrupt()
    parser = argparse.ArgumentParser(description="Vault sealed for minutes.")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory()))
        (folder / "vault").mkdir()
        (folder / "service").mkdir()
        try:
            postgres = ends.enter_context(running_postgres())
            vault = ends.enter_context(running_vault(folder / "vault"))
        except pytest.skip.Exception as missing:
            print(f"{missing}; nothing measured")
            return
        made = ends.enter_context(running_production(folder / "service", postgres, vault))
        first, _second = made.process("first"), made.process("second")
        platform = ends.enter_context(made.platform(first))
        platform.create_tenant(TenantCreate(id="acme"))
        secrets = [
            platform.create_api_key("acme", ApiKeyCreate(name=role.value, role=role)).secret
            for role in (Role.ADMIN, Role.CLIENT)
        ]
        admin, client = (ends.enter_context(KeyService(first.url, secret)) for secret in secrets)
        staged(first.url, platform, admin)
        client.release("acme", "open", 1, "client")
        result = endure(made, client, admin, options.minutes * 60)
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
