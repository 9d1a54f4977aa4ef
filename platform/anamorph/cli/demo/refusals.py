"""Step 3: what must fail, and how: each line is a real request or a real load."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.table import Table

from anamorph.cli.demo.stage import ACME, GLOBEX, Stage
from anamorph.cli.machine.home import MODEL
from anamorph.cli.machine.tenants import active_version
from anamorph.errors import SetupError
from anamorph.replica import MANIFEST, Identity, ReplicaManifest, seal
from anamorph.replica.location import local_path
from anamorph.wire.admin import KeyVersionRead, Role
from anamorph.wire.inference import KEY_ID_HEADER
from anamorph.wire.serving import EngineSettings


@dataclass(frozen=True)
class Attempt:
    """One attempt, what must come of it and what came."""

    what: str
    expected: str
    got: str
    message: str


def show_refusals(stage: Stage) -> None:
    """Try everything that must not work and print how it was refused."""
    acme, globex = _active(stage, ACME), _active(stage, GLOBEX)
    with stage.console.status("trying"):
        attempts = [*_requests(stage, acme, globex), *_loads(stage, acme)]
    show(stage, attempts)
    stage.console.print("  A retired version (410) follows in step 4, once there is one.", style="dim")


def show(stage: Stage, attempts: list[Attempt]) -> None:
    """Print attempts as a table and check each."""
    table = Table("attempt", "refused with", "in the words", show_lines=False)
    for one in attempts:
        table.add_row(one.what, one.got, one.message)
    stage.console.print(table)
    for one in attempts:
        stage.check(one.got == one.expected, f"{one.what}: {one.expected}")


def ask(stage: Stage, version: KeyVersionRead, what: str, expected: int, **how: str | None) -> Attempt:
    """Send one completion to a version's endpoint.

    Args:
        stage: of the demo.
        version: whose endpoint is asked.
        what: the attempt in words.
        expected: the status that it must meet.
        how: ``token``, ``key_id`` or ``prompt`` where they are not the right ones.
    """
    token = how["token"] if "token" in how else stage.token(version.tenant)
    headers = {KEY_ID_HEADER: how.get("key_id") or version.require_key_id()}
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    body = {"prompt": how.get("prompt") or [1, 2, 3], "max_tokens": 1}
    url = f"{version.endpoint}/v1/completions"
    response = httpx.post(url, json=body, headers=headers, timeout=60, trust_env=False)
    message = response.json().get("error", {}).get("message", "") if response.status_code >= 400 else ""
    return Attempt(what, str(expected), str(response.status_code), message)


def _active(stage: Stage, tenant: str) -> KeyVersionRead:
    with stage.keys(tenant, Role.CLIENT) as keys:
        version = active_version(keys, tenant)
    if version is None:
        raise SetupError(f"{tenant} has no active version")
    return version


def _requests(stage: Stage, acme: KeyVersionRead, globex: KeyVersionRead) -> list[Attempt]:
    foreign = stage.token(GLOBEX)
    return [
        ask(stage, acme, "a right request, for comparison", 200),
        ask(stage, acme, "a prompt in clear text", 422, prompt="What is the capital of France?"),
        ask(stage, acme, "no inference token", 401, token=None),
        ask(stage, acme, "globex's inference token on acme's model", 401, token=foreign),
        ask(stage, acme, "globex's key on acme's model", 409, key_id=globex.key_id),
    ]


def _loads(stage: Stage, version: KeyVersionRead) -> list[Attempt]:
    """What an engine does with a replica that somebody has touched: the code path of every engine start."""
    kinds: tuple[tuple[str, str, Callable[[Path], None]], ...] = (
        ("an untouched copy of the replica, for comparison", "loaded", lambda _: None),
        ("a replica with one flipped byte", "refused at load", _flip_one_byte),
        ("a replica that was altered and signed again", "refused at load", _alter_and_sign_again),
    )
    with tempfile.TemporaryDirectory(dir=stage.home.scratch) as scratch:
        attempts = []
        for number, (what, expected, alter) in enumerate(kinds):
            copy = _copied(version, Path(scratch) / str(number))
            alter(copy)
            got, message = _load(stage, version, copy)
            attempts.append(Attempt(what, expected, got, message))
        return attempts


def _copied(version: KeyVersionRead, copy: Path) -> Path:
    folder = local_path(version.artifact.replica) if version.artifact else None
    if folder is None:
        raise SetupError("the demo needs replicas in a local folder")
    return Path(shutil.copytree(folder, copy, copy_function=os.link))


def _flip_one_byte(folder: Path) -> None:
    shard = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.unlink()  # it is a link to the true one
    shard.write_bytes(content)


def _alter_and_sign_again(folder: Path) -> None:
    """As a thief of the storage would: every digest right, signed with a key of his own."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    _flip_one_byte(folder)
    manifest = ReplicaManifest.from_bytes((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).unlink()
    identity = Identity(**manifest.model_dump(include=set(Identity.model_fields)))
    seal(folder, identity, Ed25519PrivateKey.generate().sign)


def _load(stage: Stage, version: KeyVersionRead, folder: Path) -> tuple[str, str]:
    """Start an engine on a folder in a process of its own, with the settings that the operator would write.

    Without the manifest's digest, so that nothing but the signature stands between a thief and a load.
    """
    settings = EngineSettings(
        tenant=ACME,
        model=MODEL,
        version=version.version,
        replica=str(folder),
        key_id=version.key_id,
        public_key=version.public_key,
        dtype=stage.dtype,
        context_length=256,
        num_blocks=16,
    )
    command = [sys.executable, "-m", "anamorph.cli.demo.load"]
    done = subprocess.run(
        command, input=settings.model_dump_json(), capture_output=True, text=True, check=False
    )
    lines = done.stdout.strip().splitlines()
    verdict = {0: "loaded", 3: "refused at load"}.get(done.returncode, f"exit code {done.returncode}")
    return verdict, lines[-1] if lines else ""
