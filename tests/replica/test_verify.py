"""Verification: what passes, and the one error for everything that does not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anamorph.errors import InvalidKey, ReplicaRefused
from anamorph.keys import TenantKey
from anamorph.replica import MANIFEST, Identity, ReplicaManifest, seal, verify

FILES = [
    "anamorph.json",
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
]


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << bit
    path.write_bytes(bytes(data))


def test_an_untouched_replica_passes_and_says_whose_it_is(replica: Path, key: TenantKey) -> None:
    """A replica as it was sealed verifies under its key's public half, by path and by URL."""
    manifest = verify(replica, key.public_key())
    assert manifest.key_id == key.id
    assert verify(f"file://{replica}", key.public_key()) == manifest
    assert sorted([*manifest.files, MANIFEST]) == FILES


def test_expectations_of_the_caller_are_met(replica: Path, key: TenantKey, manifest: ReplicaManifest) -> None:
    """The right key id and manifest digest pass."""
    verify(replica, key.public_key(), key_id=key.id, manifest_sha256=manifest.sha256())


def test_another_signed_replica_of_the_same_key_is_refused(replica: Path, key: TenantKey) -> None:
    """A digest from the version record pins one manifest among all that the key has signed."""
    with pytest.raises(ReplicaRefused):
        verify(replica, key.public_key(), manifest_sha256="0" * 64)


def test_another_key_id_is_refused(replica: Path, key: TenantKey) -> None:
    """A replica for another version is not served under this one."""
    with pytest.raises(ReplicaRefused):
        verify(replica, key.public_key(), key_id=key.id.replace(".v1.", ".v2."))


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_byte_in_any_file_is_refused(replica: Path, key: TenantKey, name: str) -> None:
    """First, middle and last byte of every file are covered."""
    size = (replica / name).stat().st_size
    for position in (0, size // 2, size - 1):
        flip(replica / name, position)
        with pytest.raises(ReplicaRefused):
            verify(replica, key.public_key())
        flip(replica / name, position)
    verify(replica, key.public_key())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_one_flipped_bit_anywhere_is_refused(
    replica: Path, key: TenantKey, name: str, position: int, bit: int
) -> None:
    """No bit of any file is outside what signature and digests cover."""
    flip(replica / name, position, bit)
    try:
        with pytest.raises(ReplicaRefused):
            verify(replica, key.public_key())
    finally:
        flip(replica / name, position, bit)


def test_altered_and_signed_again_is_refused(
    replica: Path, identity: Identity, key: TenantKey, other_key: TenantKey
) -> None:
    """A consistent replica under a key of the attacker's own fails the trust anchor."""
    flip(replica / FILES[3], -1)
    seal(replica, identity, other_key.sign)
    verify(replica, other_key.public_key())
    with pytest.raises(ReplicaRefused, match="not signed"):
        verify(replica, key.public_key())


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(replica: Path, key: TenantKey, name: str) -> None:
    """Every listed file, and the manifest itself, must be there."""
    (replica / name).unlink()
    with pytest.raises(ReplicaRefused):
        verify(replica, key.public_key())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_shorter_or_longer_file_is_refused(replica: Path, key: TenantKey, name: str, change: int) -> None:
    """Truncation and appended bytes are both alterations."""
    data = (replica / name).read_bytes()
    (replica / name).write_bytes(data[:-1] if change < 0 else data + b" ")
    with pytest.raises(ReplicaRefused):
        verify(replica, key.public_key())


@pytest.mark.parametrize(
    "name",
    [
        "extra.safetensors",
        "tokenizer.json",
        "vocab.json",
        "pytorch_model.bin",
        "weights.pt",
        "modeling.py",
        ".hidden",
        "a..b.safetensors",
        "notes.txt",
    ],
)
def test_an_added_file_is_refused(replica: Path, key: TenantKey, name: str) -> None:
    """Nothing unlisted stands beside a replica: no second shard, tokenizer, pickle or code."""
    (replica / name).write_bytes(b"x")
    with pytest.raises(ReplicaRefused):
        verify(replica, key.public_key())


def test_a_subfolder_is_refused(replica: Path, key: TenantKey) -> None:
    """A replica is flat."""
    (replica / "sub.safetensors").mkdir()
    with pytest.raises(ReplicaRefused, match="folder"):
        verify(replica, key.public_key())


@pytest.mark.parametrize("name", ["config.json", FILES[3], MANIFEST])
def test_a_link_is_refused_even_to_the_right_bytes(
    replica: Path, key: TenantKey, tmp_path: Path, name: str
) -> None:
    """A link could point elsewhere a moment later."""
    shutil.move(replica / name, tmp_path / "moved")
    (replica / name).symlink_to(tmp_path / "moved")
    with pytest.raises(ReplicaRefused, match="link"):
        verify(replica, key.public_key())


def test_a_pipe_is_refused_without_waiting_for_a_writer(replica: Path, key: TenantKey) -> None:
    """A named pipe in the place of a shard neither blocks nor passes."""
    (replica / FILES[3]).unlink()
    os.mkfifo(replica / FILES[3])
    with pytest.raises(ReplicaRefused):
        verify(replica, key.public_key())


EDITS: dict[str, Any] = {
    "format": "anamorph-replica/v2",
    "key_id": "acme.tiny.v2.0011223344556677",
    "kcv": "0" * 16,
    "vocab_kcv": "0" * 16,
    "profile": "permute",
    "table": "other/1",
    "base_tag": "0" * 64,
    "plan_tag": "0" * 64,
    "added": [],
    "files": {"config.json": {"size": 0, "chunks": []}},
    "signature": "",
    "unknown": 1,
}


def test_every_field_of_the_manifest_is_tried() -> None:
    """The edits below leave no field out."""
    assert set(ReplicaManifest.model_fields) == set(EDITS) - {"unknown"}


@pytest.mark.parametrize("field", EDITS)
def test_an_edited_manifest_is_refused(
    replica: Path, key: TenantKey, rewrite: Callable[[dict[str, object]], None], field: str
) -> None:
    """No field can be changed, emptied or added under the old signature."""
    rewrite({field: EDITS[field]})
    with pytest.raises(ReplicaRefused):
        verify(replica, key.public_key())


@pytest.mark.parametrize("version", ["anamorph-replica/v0", "anamorph-replica/v2", None, 1])
def test_another_format_is_refused_by_name(
    replica: Path, key: TenantKey, rewrite: Callable[[dict[str, object]], None], version: object
) -> None:
    """The message says which format was found and which one is read."""
    rewrite({"format": version})
    with pytest.raises(ReplicaRefused, match=rf"'{version}' is not 'anamorph-replica/v1'"):
        verify(replica, key.public_key())


@pytest.mark.parametrize("anchor", [b"", b"x" * 31, b"x" * 64, "x" * 32, None])
def test_no_answer_without_a_trust_anchor(replica: Path, anchor: Any) -> None:
    """Something that is no public key is an error, never a pass."""
    with pytest.raises(InvalidKey):
        verify(replica, anchor)


def test_a_place_with_no_replica_is_refused(tmp_path: Path, key: TenantKey) -> None:
    """A missing folder, a file, and an empty folder answer like a forgery."""
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for name in ("missing", "file", "empty"):
        with pytest.raises(ReplicaRefused):
            verify(tmp_path / name, key.public_key())


def test_an_object_store_is_verified_in_place(replica: Path, key: TenantKey) -> None:
    """The same rules hold for a URL: an added or altered object is refused."""
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(replica), "/verify-here", recursive=True)
    verify("memory://verify-here", key.public_key())
    filesystem.pipe_file("/verify-here/tokenizer.json", b"{}")
    with pytest.raises(ReplicaRefused):
        verify("memory://verify-here", key.public_key())
    filesystem.rm_file("/verify-here/tokenizer.json")
    filesystem.pipe_file("/verify-here/config.json", b"{}")
    with pytest.raises(ReplicaRefused, match="differs"):
        verify("memory://verify-here", key.public_key())
    filesystem.rm("/verify-here", recursive=True)
    with pytest.raises(ReplicaRefused):
        verify("memory://verify-here", key.public_key())
