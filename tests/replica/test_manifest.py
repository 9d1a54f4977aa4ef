"""The manifest: one spelling, chunk digests, and nothing beside them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from anamorph.errors import ReplicaRefused
from anamorph.keys import TenantKey
from anamorph.replica import CHUNK, FileEntry, Identity, ReplicaManifest, build_manifest, keyed_tag, seal
from anamorph.replica.manifest import is_replica_file


def test_the_file_is_canonical_json(replica: Path, manifest: ReplicaManifest) -> None:
    """Sorted keys, no spaces, ASCII: exactly what Python's json writes with these options."""
    data = (replica / "anamorph.json").read_bytes()
    assert data == json.dumps(json.loads(data), sort_keys=True, separators=(",", ":")).encode("ascii")
    assert hashlib.sha256(data).hexdigest() == manifest.sha256()


def test_the_signature_covers_all_other_fields(manifest: ReplicaManifest) -> None:
    """Signed bytes are the canonical JSON of the manifest without ``signature``."""
    content = json.loads(manifest.to_bytes())
    assert len(content.pop("signature")) == 88
    assert json.loads(manifest.signed_bytes()) == content


@pytest.mark.parametrize(
    "spell",
    [
        lambda text: text + "\n",
        lambda text: text.replace(":", ": ", 1),
        lambda text: text.replace('"size":', '"size":1,"size":', 1),
        lambda text: text.replace('"files"', '"\\u0066iles"', 1),
        lambda text: "\ufeff" + text,
    ],
    ids=["newline", "space", "duplicate", "escape", "byte-order-mark"],
)
def test_any_other_spelling_is_refused(manifest: ReplicaManifest, spell: Any) -> None:
    """Two parsers can never read two things out of one accepted file."""
    with pytest.raises(ReplicaRefused):
        ReplicaManifest.from_bytes(spell(manifest.to_bytes().decode()).encode())


@pytest.mark.parametrize("data", [b"", b"null", b"[]", b"{}", b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    """Garbage ends in the one error, whatever kind it is."""
    with pytest.raises(ReplicaRefused):
        ReplicaManifest.from_bytes(data)


def test_every_four_mebibytes_have_their_own_digest(replica: Path, identity: Identity) -> None:
    """A file of two chunks and one byte carries three digests, and a reader can check any one alone."""
    weights = replica / "model-00001-of-00002.safetensors"
    weights.write_bytes(weights.read_bytes().ljust(2 * CHUNK, b"\0") + b"!")
    data = weights.read_bytes()
    entry = build_manifest(replica, identity).files[weights.name]
    parts = [data[:CHUNK], data[CHUNK : 2 * CHUNK], b"!"]
    assert entry.size == 2 * CHUNK + 1
    assert entry.chunks == tuple(hashlib.sha256(part).hexdigest() for part in parts)
    assert all(entry.matches(index, part) for index, part in enumerate(parts))
    assert not entry.matches(1, parts[0])
    assert not entry.matches(2, b"!!")


@pytest.mark.parametrize(("size", "chunks"), [(1, 0), (0, 1), (CHUNK, 2), (CHUNK + 1, 1), (-1, 0)])
def test_digests_must_fit_the_size(size: int, chunks: int) -> None:
    """A size with too few or too many digests is malformed."""
    with pytest.raises(ValidationError):
        FileEntry(size=size, chunks=("0" * 64,) * chunks)


@pytest.mark.parametrize(
    "name",
    [
        "../config.json",
        "a/b.safetensors",
        "..safetensors",
        "a..b.safetensors",
        ".safetensors",
        "tokenizer.json",
        "model.bin",
        "a\n.safetensors",
        "é.safetensors",
        "",
    ],
)
def test_only_the_names_of_the_specification_are_replica_files(name: str) -> None:
    """Paths, hidden files, tokenizers and pickles have no place in a replica."""
    assert not is_replica_file(name)
    assert is_replica_file("model-00001-of-00002.safetensors")


def test_the_kcv_is_the_one_in_the_key_id(identity: Identity) -> None:
    """A manifest cannot name one key and check another."""
    with pytest.raises(ValidationError):
        Identity.model_validate(identity.model_dump() | {"kcv": "0" * 16})


def test_tags_tell_nothing_without_the_key(key: TenantKey, other_key: TenantKey) -> None:
    """Two keys tag one base differently, so a tag neither names the base nor links two tenants."""
    tags = {keyed_tag(owner.subkey("plan"), b"base digest") for owner in (key, other_key)}
    assert len(tags) == 2


def test_a_tag_is_hmac_sha256() -> None:
    """The value was computed apart, with the standard library's ``hmac`` alone."""
    expected = "29d19b4415e968da6ace31c97968d6b0895eb76aaba54c3c7f06b326251fb267"
    assert keyed_tag(b"k" * 32, b"m") == expected


CONFIGS = [
    {"auto_map": {"AutoModel": "modeling.Model"}},
    {"text_config": {"auto_map": {}}},
    {"_name_or_path": "org/model"},
    {"layers": [{"base_model_name_or_path": "org/model"}]},
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_nothing_that_runs_code_or_names_the_base_is_sealed(
    replica: Path, identity: Identity, key: TenantKey, config: dict[str, Any], name: str
) -> None:
    """Forbidden configuration fields are found at any depth before the manifest is signed."""
    (replica / name).write_text(json.dumps(config))
    with pytest.raises(ReplicaRefused, match="runs no code and names no base"):
        seal(replica, identity, key.sign)


def test_a_safetensors_header_carries_no_metadata(replica: Path, identity: Identity, key: TenantKey) -> None:
    """Free text in a shard's header is plaintext about the base."""
    header = json.dumps({"__metadata__": {"format": "pt", "source": "org/model"}}).encode()
    shard = replica / "model-00001-of-00002.safetensors"
    shard.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ReplicaRefused, match="metadata"):
        seal(replica, identity, key.sign)


def test_an_index_points_at_shards_of_this_folder_only(
    replica: Path, identity: Identity, key: TenantKey
) -> None:
    """A weight map cannot lead a loader out of the replica."""
    index = {"metadata": {}, "weight_map": {"a": "../elsewhere.safetensors"}}
    (replica / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ReplicaRefused, match="shard"):
        seal(replica, identity, key.sign)


def test_a_folder_with_a_tokenizer_is_not_sealed(replica: Path, identity: Identity, key: TenantKey) -> None:
    """A tokenizer would publish the vocabulary order."""
    (replica / "tokenizer.json").write_text("{}")
    with pytest.raises(ReplicaRefused):
        seal(replica, identity, key.sign)
