"""What an engine's start is measured by, and how it finds its replica through the node's cache."""

from __future__ import annotations

import gc
import json
import uuid
from base64 import b64encode
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pytest
from safetensors.numpy import save, save_file

from anamorph import telemetry
from anamorph.errors import BaseRefused, ReplicaRefused, SetupError
from anamorph.keys import TenantKey
from anamorph.replica import Identity, ReplicaManifest, Store, seal
from anamorph.serve.api.endpoint import Endpoint
from anamorph.serve.applications.engine import EngineReplica
from anamorph.serve.engines.coldstart import ColdStart
from anamorph.serve.engines.loading import open_engine
from anamorph.wire.serving import EngineSettings

if TYPE_CHECKING:
    from tests.serve.conftest import Serve


@dataclass
class Published:
    """A replica in an object store of this process."""

    url: str
    manifest: ReplicaManifest
    key: TenantKey
    cache: Path

    def settings(self, **changes: Any) -> EngineSettings:
        fields = {
            "tenant": self.key.tenant,
            "model": self.key.model,
            "version": self.key.version,
            "replica": self.url,
            "key_id": self.key.id,
            "public_key": b64encode(self.key.public_key()).decode(),
            "manifest_sha256": self.manifest.sha256(),
            "engine": "fake",
            "context_length": 100,
            "cache": {"folder": str(self.cache)},
        }
        return EngineSettings.model_validate(fields | changes)


@pytest.fixture
def published(tmp_path: Path) -> Published:
    key, folder = TenantKey.from_root(bytes(32), "acme", "smol", 1), tmp_path / "replica"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 100}))
    save_file({"a": np.zeros(9, np.float32)}, folder / "model.safetensors", metadata={"format": "pt"})
    about = {"key_id": key.id, "kcv": key.kcv, "vocab_kcv": key.vocab_kcv, "profile": "rotate"}
    tags = {"table": "llama/1", "base_tag": "0" * 64, "plan_tag": "0" * 64}
    manifest = seal(folder, Identity.model_validate(about | tags), key.sign)
    url = Store(f"memory://{uuid.uuid4().hex}").publish(folder, "acme/smol/v1")
    return Published(url, manifest, key, tmp_path / "cache")


@pytest.fixture
def baseline(published: Published) -> EngineSettings:
    """The same files as a plaintext model of an object store, with a tokenizer beside them."""
    url = f"memory://{uuid.uuid4().hex}"
    fsspec.filesystem("memory").pipe(
        {
            f"{url}/config.json": b'{"vocab_size": 100}',
            f"{url}/model.safetensors": save({"a": np.zeros(9, np.float32)}),
            f"{url}/tokenizer.json": b"{}",
        }
    )
    plain = {"tenant": "plaintext", "version": 0, "protection": "plaintext", "replica": url}
    return published.settings(**plain, key_id=None, public_key=None, manifest_sha256=None)


def test_a_baseline_comes_through_the_cache(baseline: EngineSettings, published: Published) -> None:
    """Once for each state of its objects; nothing is verified, so the store is asked at every start."""
    entries = published.cache / "entries"
    for expected in (1, 1, 2):
        if expected == 2:
            fsspec.filesystem("memory").pipe(f"{baseline.replica}/config.json", b'{"vocab_size": 64}')
        start = ColdStart()
        engine = open_engine(baseline, start=start)
        assert set(start.seconds) == {"fetch", "load"}
        assert len(list(entries.iterdir())) == expected
        engine.close()
    assert {path.name for path in entries.glob("*/*")} == {"config.json", "model.safetensors"}


def test_a_baseline_counts_in_the_caches_limit(baseline: EngineSettings, published: Published) -> None:
    """One that is larger is refused with the setting to change; one that fits makes older ones go."""
    limits = [20, 200]
    small, roomy = ({"folder": str(published.cache), "limit_bytes": limit} for limit in limits)
    with pytest.raises(SetupError, match="limit_bytes"):
        open_engine(EngineSettings.model_validate(baseline.model_dump() | {"cache": small}))
    assert list((published.cache / "entries").iterdir()) == []
    changed = baseline.model_dump() | {"cache": roomy}
    for size in (64, 65):
        content = json.dumps({"vocab_size": size}).encode()
        fsspec.filesystem("memory").pipe(f"{baseline.replica}/config.json", content)
        open_engine(EngineSettings.model_validate(changed)).close()
        gc.collect()
    [left] = (published.cache / "entries").iterdir()
    assert json.loads((left / "config.json").read_text()) == {"vocab_size": 65}


def test_a_baseline_that_is_not_whole_is_refused_by_name(baseline: EngineSettings) -> None:
    """As a base is: the message says what to upload."""
    fsspec.filesystem("memory").rm(f"{baseline.replica}/model.safetensors")
    with pytest.raises(BaseRefused, match=r"no model\.safetensors"):
        open_engine(baseline)


def damage(entry: Path) -> None:
    content = bytearray((entry / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (entry / "model.safetensors").write_bytes(content)


def test_a_replica_comes_through_the_cache(published: Published) -> None:
    """The first start fetches, the next one finds it; each verifies and loads, and says how long it took."""
    for phases in ({"fetch", "verify", "load"}, {"verify", "load"}):
        start = ColdStart()
        engine = open_engine(published.settings(), start=start)
        assert set(start.seconds) == phases
        assert engine.vocab_size == 100
        engine.close()
    assert (published.cache / "entries" / published.manifest.sha256() / "config.json").is_file()


def test_a_damaged_copy_is_repaired_before_it_is_loaded(published: Published) -> None:
    """What lies in the cache is never trusted for having been right."""
    open_engine(published.settings()).close()
    damage(published.cache / "entries" / published.manifest.sha256())
    start = ColdStart()
    open_engine(published.settings(), start=start).close()
    assert set(start.seconds) == {"fetch", "verify", "load"}


def test_an_entry_is_held_for_as_long_as_its_engine(published: Published) -> None:
    """Another replica finds no room while an engine computes with the only one that fits."""
    size = sum(file.size for file in published.manifest.files.values())
    settings = published.settings(cache={"folder": str(published.cache), "limit_bytes": size})
    engine = open_engine(settings)
    held = published.cache / "locks" / f"{published.manifest.sha256()}.use"
    from anamorph.replica.locks import locked

    with locked(held, wait=False) as free:
        assert not free
    engine.close()
    del engine
    with locked(held, wait=False) as free:
        assert free


def test_without_an_anchor_nothing_is_fetched(published: Published) -> None:
    """Settings without a public key, or with another's, leave the cache as it was."""
    for changes in ({"public_key": None}, {"public_key": b64encode(bytes(32)).decode()}):
        with pytest.raises(ReplicaRefused):
            open_engine(published.settings(**changes))
    assert not list(published.cache.glob("entries/*"))


def test_a_cache_that_is_open_to_others_is_a_setup_error(published: Published) -> None:
    """The engine does not start on files that others could change."""
    published.cache.mkdir(mode=0o755)
    with pytest.raises(SetupError, match="chmod 700"):
        open_engine(published.settings())


def test_a_folder_that_changes_while_it_is_loaded_is_refused(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was loaded must be what was verified, to the last moment."""
    from anamorph.serve.engines import folder as configuration

    read = configuration.read

    def changed_meanwhile(folder: Path, name: str) -> dict[str, Any]:
        found = read(folder, name)
        damage(folder)
        return found

    monkeypatch.setattr(configuration, "read", changed_meanwhile)
    with pytest.raises(ReplicaRefused, match="changed"):
        open_engine(published.settings())


async def test_every_phase_is_on_the_metrics_page(serve: Serve) -> None:
    """Phases that passed before there was telemetry, and the first token of the first answer, once."""
    served = serve()
    seconds = chain([0.0, 2.0, 10.0, 10.5, 20.0, 23.0], repeat(23.0))
    start = ColdStart(clock=lambda: next(seconds))
    for phase in ("fetch", "verify", "load"):
        with start.phase(phase):
            pass
    observed = telemetry.build("anamorph-test")
    endpoint = Endpoint(served.endpoint.settings, served.endpoint.engine, observed, start=start)
    served.endpoint._start = endpoint._start
    body = {"prompt": [11, 12, 13], "max_tokens": 4}
    for _ in range(3):
        (await served.http.post("/v1/completions", json=body, headers=served.headers())).raise_for_status()
    page = observed.prometheus().decode()
    observed.shutdown()
    name = "anamorph_engine_cold_start_seconds"
    sums = {line.split('anamorph_phase="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1])
            for line in page.splitlines() if line.startswith(f"{name}_sum")}  # fmt: skip
    assert sums.pop("first_token") > 0
    assert sums == {"fetch": 2.0, "verify": 0.5, "load": 3.0}
    counts = [line for line in page.splitlines() if line.startswith(f"{name}_count")]
    assert [line.rsplit(" ", 1)[1] for line in counts] == ["1.0"] * 4


def test_a_replica_process_records_its_start(published: Published) -> None:
    """The process that Ray starts has its phases on its page before the first request."""
    replica = EngineReplica(published.settings().model_dump(mode="json"))
    page = replica._endpoint.telemetry.prometheus().decode()
    for phase in ("fetch", "verify", "load"):
        assert any(
            line.startswith("anamorph_engine_cold_start_seconds_count")
            and f'anamorph_phase="{phase}"' in line
            for line in page.splitlines()
        )
