"""The materialisation job against the real key service: what it reports, keeps quiet, and takes up again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from base64 import b64decode, b64encode, urlsafe_b64encode
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import httpx
import pytest

from anamorph.cli.materialize import Order, run
from anamorph.errors import ServiceError
from anamorph.keys import TenantKey
from anamorph.keys.derive import PURPOSES
from anamorph.replica import Store, verify
from anamorph.wire.admin import KeyVersionRead, ReleaseRead
from anamorph.wire.keyservice import KeyService
from anamorph.wire.states import State

pytestmark = pytest.mark.real

Run = Callable[..., CompletedProcess[str]]


def job(anamorph: Run, order: dict[str, Any]) -> CompletedProcess[str]:
    return anamorph("materialize", stdin=json.dumps(order))


class Watched(httpx.HTTPTransport):
    """The network, failing where it is told to."""

    def __init__(self, fail_at: str = "nowhere") -> None:
        super().__init__()
        self._fail_at = fail_at

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith(self._fail_at):
            raise httpx.ConnectError("the line went dead")
        return super().handle_request(request)


class Remembering(KeyService):
    """Keeps the root that it was given: on the network it is sealed."""

    root = b""

    def release(self, *args: Any, **options: Any) -> ReleaseRead:
        released = super().release(*args, **options)
        self.root = released.material()
        return released


@pytest.mark.slow
def test_a_job_stages_a_replica_that_verifies(anamorph: Run, materializing: Any) -> None:
    """Exit 0, STAGED, and what the version record says leads to a replica signed by its key."""
    done = job(anamorph, materializing.order(workers=2))
    assert done.returncode == 0, done.stderr
    version = materializing.version
    assert version.state is State.STAGED
    assert version.artifact is not None
    manifest = verify(
        version.artifact.replica,
        b64decode(version.public_key),
        key_id=version.key_id,
        manifest_sha256=version.artifact.manifest_sha256,
    )
    assert manifest.vocab_kcv == version.vocab_kcv
    assert Store(str(materializing.store)).list() == [f"{materializing.tenant}/chat/v1"]
    assert not (materializing.scratch / materializing.tenant / "chat" / "v1").exists()


def spellings(secret: bytes) -> set[bytes]:
    """Raw, hexadecimal, and base64 without its last, shared characters."""
    return {secret, secret.hex().encode(), b64encode(secret)[:42], urlsafe_b64encode(secret)[:42]}


def secrets_of(keys: Remembering, version: KeyVersionRead) -> set[bytes]:
    """The root and every subkey that a materialisation derives, in every spelling."""
    key = TenantKey.from_root(keys.root, version.tenant, version.model, version.version)
    assert key.id == version.key_id
    spaces = [*PURPOSES, "residual", "layers.0.heads", "layers.1.qk", "layers.0.vo", "layers.1.ffn"]
    return {form for secret in (keys.root, *map(key.subkey, spaces)) for form in spellings(secret)}


def test_neither_grant_nor_key_is_left_anywhere(
    materializing: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """Root and subkeys, raw, hex or base64: in no file of a real replica or of scratch, nor printed."""
    order = materializing.order()
    keys = Remembering(order["keysvc"], order["grant"], transport=Watched(fail_at=":stage"))
    with keys, pytest.raises(ServiceError) as caught:
        run(Order.model_validate(order), keys)
    files = [path for top in (materializing.store, materializing.scratch) for path in top.rglob("*")]
    content = b"".join(path.read_bytes() for path in files if path.is_file())
    printed = "".join(capfd.readouterr()) + repr(caught.value) + repr(Order.model_validate(order))
    assert len(keys.root) == 32
    assert {path.name for path in files} > {"anamorph.json", "model.safetensors"}
    for secret in {order["grant"].encode()} | secrets_of(keys, materializing.version):
        assert secret not in content
        assert secret not in printed.encode()


@pytest.mark.slow
def test_a_replica_published_by_a_killed_job_is_reused(anamorph: Run, materializing: Any) -> None:
    """Killed between publishing and reporting: the next job stages the very same replica."""
    order = materializing.order()
    keys = KeyService(order["keysvc"], order["grant"], transport=Watched(fail_at=":stage"))
    with keys, pytest.raises(ServiceError):
        run(Order.model_validate(order), keys)
    published = materializing.store / materializing.tenant / "chat" / "v1"
    before = {path.name: path.stat().st_mtime_ns for path in published.iterdir()}
    assert job(anamorph, materializing.order()).returncode == 0
    assert {path.name: path.stat().st_mtime_ns for path in published.iterdir()} == before
    assert materializing.version.state is State.STAGED


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["scratch", "folded", "published"])
def test_a_job_killed_at_any_moment_is_finished_by_the_next(
    anamorph: Run, materializing: Any, moment: str
) -> None:
    """SIGKILL when scratch, replica or publication appears; a new grant brings it to STAGED."""
    place = f"{materializing.tenant}/chat/v1"
    sign = {
        "scratch": materializing.scratch / place,
        "folded": materializing.scratch / place / "replica",
        "published": materializing.store / place,
    }[moment]
    kill_when(sign, materializing.order())
    if materializing.version.state is State.MATERIALIZING:
        assert job(anamorph, materializing.order()).returncode == 0
    version = materializing.version
    assert version.state is State.STAGED
    verify(version.artifact.replica, b64decode(version.public_key), key_id=version.key_id)


def kill_when(sign: Path, order: dict[str, Any]) -> None:
    command = [sys.executable, "-m", "anamorph.cli", "materialize"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdin is not None
    process.stdin.write(json.dumps(order).encode())
    process.stdin.close()
    while not sign.exists() and process.poll() is None:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_a_base_outside_the_allow_list_fails_for_good(anamorph: Run, materializing: Any) -> None:
    """Exit 3, FAILED with a reason, and the root was never asked for."""
    done = job(anamorph, materializing.order(allow_base=["/srv/models"]))
    assert done.returncode == 3
    version = materializing.version
    assert version.state is State.FAILED
    assert "--allow-base" in version.failure
    assert "materialize" in materializing.audit()
    assert not any("release" in action for action in materializing.audit())
    assert not materializing.store.exists()


@pytest.mark.slow
def test_an_unsupported_model_fails_for_good(anamorph: Run, materializing: Any, tmp_path: Path) -> None:
    """Exit 3, and the reason names the architecture."""
    odd = tmp_path / "odd"
    odd.mkdir()
    config = {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    (odd / "config.json").write_text(json.dumps(config))
    from safetensors.numpy import save_file

    save_file({}, odd / "model.safetensors")
    done = job(anamorph, materializing.order(base=str(odd), allow_base=[str(tmp_path)]))
    assert done.returncode == 3, done.stderr
    assert materializing.version.state is State.FAILED
    assert "amba" in materializing.version.failure


def test_a_void_grant_ends_the_job_and_changes_nothing(anamorph: Run, materializing: Any) -> None:
    """When a newer grant exists the old job stops; it neither publishes nor fails the version."""
    old = materializing.order()
    materializing.order()
    done = job(anamorph, old)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert materializing.version.state is State.MATERIALIZING
    assert not materializing.store.exists()


@pytest.mark.parametrize("spoil", [lambda o: o | {"version": 0}, lambda o: o | {"colour": 1}, lambda _: "?"])
def test_a_malformed_order_is_not_repeated_to_anyone(
    anamorph: Run, materializing: Any, spoil: Callable[[dict[str, Any]], Any]
) -> None:
    """Exit 2, and the error names fields but no values."""
    order = materializing.order()
    done = job(anamorph, spoil(order))
    assert done.returncode == 2
    assert "malformed" in done.stderr
    assert order["grant"] not in done.stderr + done.stdout


def test_an_order_without_a_service_may_be_tried_again(anamorph: Run, materializing: Any) -> None:
    """A key service that does not answer is exit 1: nothing is lost by waiting."""
    done = job(anamorph, materializing.order(keysvc="http://127.0.0.1:9"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
