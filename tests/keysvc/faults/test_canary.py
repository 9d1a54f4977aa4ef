"""Known key bytes after a full life: nowhere but in the answers that released them."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import psutil
import pytest
from tests.keysvc.faults.calls import until
from tests.keysvc.faults.site import POLICY, Owner
from tests.keysvc.test_production import dumped
from tests.keysvc.webhooks.receiver import Receiver, running_receiver

from anamorph.wire.admin import BackupCreate, WebhookCreate
from anamorph.wire.keyservice import KeyService, everything
from anamorph.wire.states import State

if TYPE_CHECKING:
    from tests.keysvc.faults.site import Site

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture
def receiver(site: Site, tmp_path: Path) -> Iterator[Receiver]:
    """Where the tenant's events go; with Vault's own certificate, which the service trusts for it."""
    both = tmp_path / "receiver.pem"
    certificate, key = site.vault.certificate
    both.write_bytes(key.read_bytes() + certificate.read_bytes())
    with running_receiver(both) as running:
        yield running


def forms(secret: bytes) -> list[bytes]:
    """Raw, hexadecimal, and base64 at each alignment that a longer text could give it."""
    shifted = [secret[skip:][: (len(secret) - skip) // 3 * 3] for skip in range(3)]
    encoded = [encode(part) for part in shifted for encode in (base64.b64encode, base64.urlsafe_b64encode)]
    return [secret, secret.hex().encode(), secret.hex().upper().encode(), *encoded]


def live(owner: Owner) -> list[bytes]:
    """Two versions, the first of which is shredded; every secret that was handed out on the way."""
    secrets = []
    for version in (1, 2):
        assert owner.rotate() == version
        secrets.append(owner.stage(version))
        owner.activate(version)
        with KeyService(owner.site.first.url, owner.client) as client:
            secrets.append(client.release(*owner.at, version, "client").material())
    time.sleep(POLICY.grace_s)
    with owner.site.platform() as platform, owner.keys() as keys:
        platform.retire(*owner.at, 1)
        keys.destroy(*owner.at, 1)
        assert platform.destroyed(*owner.at, 1).state is State.DESTROYED
        (shred,) = [one for one in everything(keys.list_operations, owner.tenant) if one.kind == "shred"]
        until(lambda: keys.get_operation(owner.tenant, shred.id).phase == "await-backup")
        platform.record_backup(BackupCreate(taken_at=datetime.now(UTC)))
        until(lambda: keys.get_operation(owner.tenant, shred.id).status == "succeeded")
    return secrets


def places(site: Site, receiver: Receiver) -> dict[str, bytes]:
    """Everything that left the service or lies on a disk, and what is to be seen of its processes."""
    production = site.production
    found = {"dump": dumped(production)}
    found["webhooks"] = b"".join(repr(one.headers).encode() + one.body for one in receiver.received)
    roots = [production.folder, site.postgres.folder, site.vault.folder]
    for path in (path for root in roots for path in root.rglob("*") if path.is_file()):
        found[str(path)] = path.read_bytes()
    for name, process in site.processes.items():
        seen = psutil.Process(process.program.pid)
        found[f"{name}: environment and command"] = repr((seen.environ(), seen.cmdline())).encode()
        found[f"{name}: metrics"] = httpx.get(f"{process.url}/metrics", trust_env=False).content
    return found


def test_key_bytes_are_nowhere(site: Site, owner: Owner, receiver: Receiver) -> None:
    """Not in a dump, files and logs of any server, checkpoints, webhooks, metrics, environments."""
    with owner.keys() as keys:
        url = f"https://127.0.0.1:{receiver.port}/hook"
        signing = keys.create_webhook(owner.tenant, WebhookCreate(url=url)).secret
        secrets = [*live(owner), base64.b64decode(signing.removeprefix("whsec_"))]
        known = (keys.get_version(*owner.at, 2).key_id or "").encode()
    until(lambda: any(b"key.destroyed" in one.body for one in receiver.received))
    searched = places(site, receiver)
    assert known in searched["dump"]  # what should be there is found this way
    assert any("checkpoints" in name for name in searched)
    assert str(site.vault.audit_log) in searched
    hits = [
        name
        for name, content in searched.items()
        for secret in secrets
        if any(form in content for form in forms(secret))
    ]
    assert hits == []
