"""A sealed replica of a few kilobytes: real safetensors, real key, no model behind it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from anamorph.keys import TenantKey
from anamorph.replica import Identity, ReplicaManifest, keyed_tag, seal

ROOT = bytes(range(32))


def write_files(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for tensor, file in names.items():
        save_file({tensor: np.arange(64, dtype=np.float32)}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 512}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def identity_of(key: TenantKey, **changes: object) -> Identity:
    fields = {
        "key_id": key.id,
        "kcv": key.kcv,
        "vocab_kcv": key.vocab_kcv,
        "profile": "rotate",
        "table": "llama/1",
        "base_tag": keyed_tag(key.subkey("plan"), b"base"),
        "plan_tag": keyed_tag(key.subkey("plan"), b"plan"),
        "added": ("lm_head.weight",),
    }
    return Identity.model_validate(fields | changes)


@pytest.fixture(scope="session")
def key() -> TenantKey:
    return TenantKey.from_root(ROOT, "acme", "tiny", 1)


@pytest.fixture(scope="session")
def other_key() -> TenantKey:
    return TenantKey.from_root(ROOT[::-1], "acme", "tiny", 1)


@pytest.fixture(scope="session")
def identity(key: TenantKey) -> Identity:
    return identity_of(key)


@pytest.fixture(scope="session")
def pristine(key: TenantKey, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "replica"
    write_files(folder)
    seal(folder, identity_of(key), key.sign)
    return folder


@pytest.fixture
def replica(pristine: Path, tmp_path: Path) -> Path:
    """A copy that a test may alter."""
    return Path(shutil.copytree(pristine, tmp_path / "replica"))


@pytest.fixture
def manifest(replica: Path) -> ReplicaManifest:
    return ReplicaManifest.from_bytes((replica / "anamorph.json").read_bytes())


@pytest.fixture
def rewrite(replica: Path) -> Callable[[dict[str, object]], None]:
    """Write these changes of top-level fields into ``anamorph.json``, canonically, signature untouched."""

    def change(fields: dict[str, object]) -> None:
        path = replica / "anamorph.json"
        content = json.loads(path.read_bytes()) | fields
        path.write_text(json.dumps(content, sort_keys=True, separators=(",", ":")))

    return change
