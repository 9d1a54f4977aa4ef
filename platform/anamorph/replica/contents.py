"""What the files of a replica may not say: the base's name, code to run, a path elsewhere.

A signed replica of ours never does. The rules hold for signed ones all the same,
so that a mistake while folding, or an odd base, is caught before anything is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from anamorph.errors import ReplicaRefused
from anamorph.replica.files import Folder, join_small
from anamorph.replica.manifest import is_replica_file

CODE_FIELDS = frozenset({"auto_map", "custom_pipelines", "custom_generate", "trust_remote_code"})
NAME_FIELDS = frozenset({"_name_or_path", "name_or_path", "base_model", "base_model_name_or_path"})
INDEX = "model.safetensors.index.json"
MAX_JSON = 64 * 2**20
"""Bytes of the largest configuration or index that is read."""


def screened(folder: Folder, name: str) -> Iterator[bytes]:
    """The chunks of one file, held to the rules above.

    Each chunk is handed out before it is parsed, so a caller that checks digests has done so by then.

    Raises:
        ReplicaRefused: the file breaks a rule.
    """
    chunks = folder.chunks(name)
    if not name.endswith(".json"):
        start = next(chunks, b"")
        yield start
        check_safetensors_header(name, start)
        yield from chunks
        return
    seen = []
    for chunk in chunks:
        seen.append(chunk)
        yield chunk
        join_small(name, seen, MAX_JSON)
    check_json(name, b"".join(seen))


def check_json(name: str, data: bytes) -> None:
    """Refuse a configuration that runs code or names the base, at any depth, or a shard out of the folder.

    Raises:
        ReplicaRefused: not a JSON object, or one that breaks a rule.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise ReplicaRefused(f"{name} is not JSON") from None
    if not isinstance(content, dict):
        raise ReplicaRefused(f"{name} is not a JSON object")
    if name == INDEX:
        _check_index(content)
    for field, value in _fields(content):
        # transformers writes an empty name when there is none; empty says nothing.
        if field in CODE_FIELDS or (field in NAME_FIELDS and value):
            raise ReplicaRefused(f"{name} holds {field!r}: a replica runs no code and names no base")


def check_safetensors_header(name: str, start: bytes) -> None:
    """Refuse metadata in a safetensors header, given the file's first chunk.

    ``__metadata__`` is plaintext that tools fill with names of models; only ``format`` may stand there.

    Raises:
        ReplicaRefused: the header is malformed, longer than a chunk, or says more than ``format``.
    """
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > len(start) - 8:
        raise ReplicaRefused(f"{name} has no readable safetensors header in its first 4 MiB")
    try:
        header = json.loads(start[8 : 8 + length])
    except (ValueError, RecursionError):
        raise ReplicaRefused(f"{name} has no readable safetensors header") from None
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if metadata not in ({}, {"format": "pt"}):
        raise ReplicaRefused(f"{name} holds metadata: a replica says nothing beside its tensors")


def _check_index(index: dict[str, Any]) -> None:
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not all(_is_shard(shard) for shard in shards.values()):
        raise ReplicaRefused(f"{INDEX} names a shard that no replica holds")


def _is_shard(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and is_replica_file(name)


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _fields(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _fields(inner)
