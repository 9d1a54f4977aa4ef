"""The whole pipeline: from key and base to something published, also when it was killed on the way."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from anamorph.checkpoint import Checkpoint
from anamorph.errors import BaseRefused, MaterializationError, ReplicaRefused, UnknownTensor
from anamorph.keys import TenantKey
from anamorph.pipeline import fold, make_part, make_replica
from anamorph.replica import Identity, Store, seal, verify

NAME = "acme/tiny/v1"


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store") if request.param == "folder" else f"memory://{uuid.uuid4().hex}")


def test_a_published_replica_is_reported_with_digest_and_probe(
    base: Path, key: TenantKey, store: Store, tmp_path: Path
) -> None:
    """What is reported is what lies in the store, in a folder or in an object store."""
    made = make_replica(base, store, NAME, key, scratch=tmp_path / "scratch")
    verify(made.replica, key.public_key(), key_id=key.id, manifest_sha256=made.manifest_sha256)
    assert made.replica == store.url_of(NAME)
    assert len(made.probe.prompts) == 3


def test_published_work_is_taken_up(base: Path, key: TenantKey, store: Store, tmp_path: Path) -> None:
    """A run that was killed after publishing is repeated without folding again."""
    first = make_replica(base, store, NAME, key, scratch=tmp_path / "first")
    phases: list[str] = []
    second = make_replica(
        base, store, NAME, key, scratch=tmp_path / "second", progress=lambda phase, _: phases.append(phase)
    )
    assert second.manifest_sha256 == first.manifest_sha256
    assert phases == ["probe"]


def test_published_work_of_another_base_is_refused(
    base: Path, key: TenantKey, store: Store, tmp_path: Path
) -> None:
    """What was published before a base changed is not reported as a replica of the new one."""
    digest = Checkpoint.open(base).digest()
    first = make_replica(base, store, NAME, key, scratch=tmp_path / "first", base_digest=digest)
    again = make_replica(base, store, NAME, key, scratch=tmp_path / "again", base_digest=digest)
    assert again.manifest_sha256 == first.manifest_sha256
    with pytest.raises(BaseRefused, match="another base than sha256:0000"):
        make_replica(base, store, NAME, key, scratch=tmp_path / "third", base_digest=f"sha256:{0:064}")


def test_finished_but_unpublished_work_is_taken_up(
    base: Path, key: TenantKey, store: Store, tmp_path: Path
) -> None:
    """A whole replica in the scratch folder is compared and published, not folded again."""
    folded = fold(base, tmp_path / "scratch" / "replica", key)
    phases: list[str] = []
    made = make_replica(
        base, store, NAME, key, scratch=tmp_path / "scratch", progress=lambda phase, _: phases.append(phase)
    )
    assert made.manifest_sha256 == folded.sha256()
    assert phases == ["compare", "publish", "probe"]


def test_parts_are_finished_as_a_whole_replica_is(
    base: Path, key: TenantKey, store: Store, tmp_path: Path
) -> None:
    """The same manifest as by one fold; and a part that comes late finds nothing left to do."""
    where: Any = {"scratch": tmp_path / "scratch", "max_shard_size": 10_000}
    written = [make_part(base, store, NAME, key, index=index, of=2, **where) for index in (1, 0)]
    made = make_replica(base, store, NAME, key, parts=2, **where)
    whole = fold(base, tmp_path / "whole", key, max_shard_size=10_000)
    assert min(written) > 0
    assert made.manifest_sha256 == whole.sha256()
    assert make_part(base, store, NAME, key, index=0, of=2, **where) == 0
    store.delete(NAME)
    assert make_part(base, store, NAME, key, index=0, of=2, **where) == 0
    other = TenantKey.from_root(b"o" * 32, "acme", "tiny", 1)
    with pytest.raises(ReplicaRefused):
        make_part(base, store, NAME, other, index=0, of=2, **where)


@pytest.mark.parametrize("damage", ["flipped", "unsigned", "other key"])
def test_damaged_work_is_made_again(
    base: Path, key: TenantKey, store: Store, tmp_path: Path, damage: str
) -> None:
    """What does not verify in the scratch folder is thrown away, never published."""
    folded = tmp_path / "scratch" / "replica"
    other = TenantKey.from_root(b"o" * 32, "acme", "tiny", 1)
    whole = fold(base, folded, other if damage == "other key" else key)
    if damage == "flipped":
        data = bytearray((folded / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (folded / "model.safetensors").write_bytes(data)
    elif damage == "unsigned":
        (folded / "anamorph.json").unlink()
    made = make_replica(base, store, NAME, key, scratch=tmp_path / "scratch")
    verify(made.replica, key.public_key(), key_id=key.id)
    assert (made.manifest_sha256 == whole.sha256()) == (damage != "other key")


def test_a_name_taken_by_another_key_is_refused(
    base: Path, key: TenantKey, store: Store, tmp_path: Path
) -> None:
    """Somebody else's replica under this name is neither used nor replaced."""
    other = TenantKey.from_root(b"o" * 32, "acme", "tiny", 1)
    theirs = make_replica(base, store, NAME, other, scratch=tmp_path / "theirs")
    with pytest.raises(ReplicaRefused):
        make_replica(base, store, NAME, key, scratch=tmp_path / "ours")
    verify(theirs.replica, other.public_key(), manifest_sha256=theirs.manifest_sha256)


def test_a_replica_that_computes_something_else_is_not_published(
    base: Path, key: TenantKey, store: Store, tmp_path: Path
) -> None:
    """A properly signed replica with wrong weights fails the comparison, and nothing is published."""
    folded = tmp_path / "scratch" / "replica"
    manifest = fold(base, folded, key)
    tensors = load_file(folded / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1.5
    save_file(tensors, folded / "model.safetensors", metadata={"format": "pt"})
    said = manifest.model_dump(include=set(Identity.model_fields))
    seal(folded, Identity.model_validate(said), key.sign)
    with pytest.raises(MaterializationError):
        make_replica(base, store, NAME, key, scratch=tmp_path / "scratch")
    assert store.list() == []


def test_an_unknown_tensor_stops_before_anything_is_written(
    base: Path, key: TenantKey, store: Store, tmp_path: Path
) -> None:
    """An unsupported base leaves neither scratch nor a name in the store."""
    odd = Path(shutil.copytree(base, tmp_path / "odd"))
    tensors = load_file(odd / "model.safetensors") | {"model.surprise": torch.zeros(3)}
    save_file(tensors, odd / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnknownTensor, match="surprise"):
        make_replica(odd, store, NAME, key, scratch=tmp_path / "scratch")
    assert store.list() == []
    assert not (tmp_path / "scratch" / "replica").exists()
