"""From settings to a loaded engine: everything is checked before anything is served."""

from __future__ import annotations

import logging
import weakref
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs

from anamorph import replica
from anamorph.errors import InvalidId, ReplicaRefused, SetupError
from anamorph.replica.location import local_path
from anamorph.serve.engines import folder as configuration
from anamorph.serve.engines.base import Engine
from anamorph.serve.engines.coldstart import ColdStart
from anamorph.serve.engines.fake import FakeEngine
from anamorph.serve.engines.ranks.layout import Layout, check_layout, own_ranks
from anamorph.wire.ids import KeyId
from anamorph.wire.inference import PLAINTEXT_FINGERPRINT
from anamorph.wire.serving import Cache, EngineSettings

FAKE = "fake:"

_log = logging.getLogger(__name__)
_for_life: list[replica.Kept] = []


def open_engine(
    settings: EngineSettings, *, threads: int | None = None, start: ColdStart | None = None
) -> Engine:
    """Verify and load what ``settings`` name.

    Args:
        settings: of the application. ``engine="fake"`` may name ``fake:?vocab_size=…&delay_ms=…``,
            which has no files.
        threads: for arithmetic on the CPU; by default torch decides.
        start: told how long each phase takes.

    Raises:
        ReplicaRefused: an encrypted replica that does not verify, or settings without trust anchor.
        BaseRefused, CheckpointError: a plaintext baseline that is not there, not whole, or just changing.
        StoreUnavailable: the store does not answer.
        SetupError: it verifies but cannot be loaded, is not there, or does not fit the node's cache.
    """
    start = start or ColdStart()
    key_id = _identity(settings)
    if settings.replica.startswith(FAKE):
        return _fileless(settings, key_id)
    kept = _kept(settings, start)
    try:
        engine = _loaded(settings, key_id, kept.folder, threads, start)
        _check_unchanged(kept, engine)
    except BaseException:
        kept.close()
        raise
    # The entry stays in the cache for as long as somebody computes with it.
    weakref.finalize(engine, kept.close)
    return engine


def hold(
    location: str,
    cache: Cache,
    *,
    public_key: str | None,
    key_id: str | None = None,
    manifest_sha256: str | None = None,
    start: ColdStart | None = None,
) -> replica.Held:
    """A verified replica in a local folder: where it lies, or from a store through the node's cache.

    Whoever loads from it calls ``check_unchanged`` afterwards, and ``close`` when done with it.

    Args:
        location: folder or URL.
        cache: where copies are kept on this node.
        public_key: raw Ed25519 public key from the version record, base64.
        key_id: the key id that the replica must be made with.
        manifest_sha256: digest of the manifest that must be there; with it, a good copy needs no store.
        start: told how long fetching and verifying take.

    Raises:
        ReplicaRefused, StoreUnavailable, SetupError: as ``open_engine``.
    """
    if public_key is None:
        raise ReplicaRefused("without the public key from the version record nothing can be verified")
    start, anchor = start or ColdStart(), b64decode(public_key)
    folder = local_path(location)
    if folder is None:
        here = _cache(cache, start)
        return here.hold(location, anchor, key_id=key_id, manifest_sha256=manifest_sha256)
    with start.phase("verify"):
        return replica.hold(_existing(folder), anchor, key_id=key_id, manifest_sha256=manifest_sha256)


def _cache(cache: Cache, start: ColdStart) -> replica.Cache:
    place = Path(cache.folder) if cache.folder else None
    return replica.Cache(place, cache.limit_bytes, progress=_Told(), phase=start.phase)


def _kept(settings: EngineSettings, start: ColdStart) -> replica.Kept:
    """The folder to load from: a verified replica, or a plaintext baseline, which nothing vouches for."""
    if settings.protection == "plaintext":
        folder = local_path(settings.replica)
        if folder is not None:
            return replica.Kept(_existing(folder))
        return _cache(settings.cache, start).hold_plain(settings.replica)
    return hold(
        settings.replica,
        settings.cache,
        public_key=settings.public_key,
        key_id=settings.key_id,
        manifest_sha256=settings.manifest_sha256,
        start=start,
    )


def _check_unchanged(kept: replica.Kept, engine: Engine) -> None:
    try:
        kept.check_unchanged()
    except ReplicaRefused:
        engine.close()
        raise


def _loaded(
    settings: EngineSettings, key_id: str, folder: Path, threads: int | None, start: ColdStart
) -> Engine:
    with start.phase("load"):
        return _engine(settings, key_id, folder, threads)


def _engine(settings: EngineSettings, key_id: str, folder: Path, threads: int | None) -> Engine:
    if settings.engine == "fake":
        config = configuration.read(folder, configuration.CONFIG)
        return _fake(settings, key_id, int(config["vocab_size"]), float(config.get("delay_ms", 0)) / 1000)
    if settings.engine == "vllm":
        return _vllm(settings, folder, threads)
    return _torch(settings, folder, threads)


def verified(settings: EngineSettings) -> tuple[Path, Callable[[], None]]:
    """The folder of an application's weights on this node, verified unless plaintext; every rank calls it.

    It stays in the node's cache until this process ends. What is returned with it is called
    after loading: it refuses a folder that has changed meanwhile.

    Raises:
        ReplicaRefused, BaseRefused, CheckpointError, StoreUnavailable, SetupError: as ``open_engine``.
    """
    _for_life.append(_kept(settings, ColdStart()))
    return _for_life[-1].folder, _for_life[-1].check_unchanged


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


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise SetupError("the replica's folder does not exist on this machine")
    return folder


class _Told:
    """Progress of a fetch, in the log of the process: every tenth."""

    def __init__(self) -> None:
        self._tenths = -1

    def __call__(self, done: int, total: int) -> None:
        tenths = 10 * done // max(total, 1)
        if tenths > self._tenths:
            self._tenths = tenths
            _log.info("fetching a replica: %d of %d MiB", done >> 20, total >> 20)


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

    check_layout(configuration.read(folder, configuration.CONFIG), Layout.of(settings), settings.num_gpus)
    if own_ranks(settings) > 1:
        from anamorph.serve.engines.ranks.actors import open_ranks

        return open_ranks(settings, folder, verified)
    if threads is not None:
        torch.set_num_threads(threads)
    return load(folder, settings.dtype, Capacity.of(settings))


def _vllm(settings: EngineSettings, folder: Path, threads: int | None) -> Engine:
    # Imported here: it reads vLLM's own package, which only an environment for it holds.
    from anamorph.serve.engines.vllm.engine import load

    return load(folder, settings, threads=threads)
