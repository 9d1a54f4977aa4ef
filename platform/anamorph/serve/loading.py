"""From settings to a loaded engine: everything is checked before anything is served."""

from __future__ import annotations

import json
import tempfile
from base64 import b64decode
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from anamorph import replica
from anamorph.errors import InvalidId, ReplicaRefused, SetupError
from anamorph.replica.location import local_path
from anamorph.serve.endpoint import PLAINTEXT_FINGERPRINT
from anamorph.serve.engines.base import Engine
from anamorph.serve.engines.fake import FakeEngine
from anamorph.wire.ids import KeyId
from anamorph.wire.serving import EngineSettings

FAKE = "fake:"


def open_engine(settings: EngineSettings, *, threads: int | None = None) -> Engine:
    """Verify and load what ``settings`` name.

    Args:
        settings: of the application. ``engine="fake"`` may name ``fake:?vocab_size=…&delay_ms=…``,
            which has no files.
        threads: for arithmetic on the CPU; by default torch decides.

    Raises:
        ReplicaRefused: an encrypted replica that does not verify, or settings without trust anchor.
        SetupError: it verifies but cannot be loaded, or is not there.
    """
    key_id = _identity(settings)
    if settings.replica.startswith(FAKE):
        return _fileless(settings, key_id)
    folder = _fetched(settings.replica)
    if settings.protection == "encrypted":
        _verify(settings, folder)
    if settings.engine == "fake":
        return _fake(settings, key_id, int(_config(folder)["vocab_size"]), 0)
    return _torch(settings, folder, threads)


def _identity(settings: EngineSettings) -> str:
    """The key id, after checking that it is the one of this (tenant, model, version)."""
    if settings.protection == "plaintext":
        if settings.key_id is not None:
            raise ReplicaRefused("a plaintext baseline has no key id")
        return PLAINTEXT_FINGERPRINT
    try:
        key = KeyId.parse(settings.key_id or "")
    except InvalidId:
        raise ReplicaRefused("an encrypted application needs the key id of its version") from None
    if (key.tenant, key.model, key.version) != (settings.tenant, settings.model, settings.version):
        raise ReplicaRefused("the key id is of another tenant, model or version than the application")
    return str(key)


def _verify(settings: EngineSettings, folder: Path) -> None:
    if settings.public_key is None:
        raise ReplicaRefused("without the public key from the version record nothing can be verified")
    replica.verify(
        folder,
        b64decode(settings.public_key),
        key_id=settings.key_id,
        manifest_sha256=settings.manifest_sha256,
    )


def _fetched(location: str) -> Path:
    folder = local_path(location)
    if folder is None:
        # Verified after the copy: what is loaded is what was checked.
        scratch = Path(tempfile.mkdtemp(prefix="anamorph-replica-"))
        folder = replica.fetch(location, scratch / "replica")
    if not folder.is_dir():
        raise SetupError("the replica's folder does not exist on this machine")
    return folder


def _config(folder: Path) -> dict[str, Any]:
    fields = json.loads((folder / "config.json").read_text())
    if not isinstance(fields, dict):
        raise SetupError("config.json is not an object")
    return fields


def _fileless(settings: EngineSettings, key_id: str) -> Engine:
    if settings.engine != "fake":
        raise SetupError(f"only the fake engine runs without files, not {settings.engine}")
    options = parse_qs(settings.replica.removeprefix(FAKE).lstrip("?"))
    vocab_size = int(options.get("vocab_size", ["1000"])[0])
    return _fake(settings, key_id, vocab_size, float(options.get("delay_ms", ["0"])[0]) / 1000)


def _fake(settings: EngineSettings, key_id: str, vocab_size: int, delay_s: float) -> Engine:
    return FakeEngine(
        key_id,
        vocab_size=vocab_size,
        context_length=settings.context_length,
        delay_s=delay_s,
        concurrent=settings.max_concurrent,
    )


def _torch(settings: EngineSettings, folder: Path, threads: int | None) -> Engine:
    # Imported here: torch takes seconds, and the fake engine does without.
    import torch

    from anamorph.serve.engines.torch import Capacity, load

    if threads is not None:
        torch.set_num_threads(threads)
    capacity = Capacity(
        context_length=settings.context_length,
        max_batch_tokens=settings.max_batch_tokens,
        num_blocks=settings.num_blocks,
        max_concurrent=settings.max_concurrent,
    )
    return load(folder, settings.dtype, capacity)
