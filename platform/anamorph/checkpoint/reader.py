"""A Hugging Face checkpoint folder, read lazily and from safetensors only."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from anamorph.errors import CheckpointError
from anamorph.models import TensorInfo

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: configurations and headers in memory, tensors on disk.

    Args:
        files: every file that the base's digest covers, sorted.
        tensors: dtype and shape of each stored tensor.
    """

    folder: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any] | None
    files: tuple[str, ...]
    tensors: Mapping[str, TensorInfo]
    shard_of: Mapping[str, str]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read configurations, index and headers.

        Raises:
            CheckpointError: no safetensors checkpoint, an index that does not match its
                shards, a name that leaves the folder, or a file that cannot be read.
        """
        folder = Path(folder)
        config = _json_object(folder, CONFIG)
        generation = (
            _json_object(folder, GENERATION_CONFIG) if (folder / GENERATION_CONFIG).exists() else None
        )
        shards, indexed = _shards(folder)
        tensors, shard_of = _headers(folder, shards)
        if indexed is not None and indexed != shard_of:
            wrong = sorted(indexed.items() ^ shard_of.items())[0][0]
            raise CheckpointError(f"index and shards of {folder} do not agree on tensor '{wrong}'")
        files = [CONFIG, *shards]
        files += [GENERATION_CONFIG] if generation is not None else []
        files += [INDEX] if indexed is not None else []
        return cls(folder, config, generation, tuple(sorted(files)), tensors, shard_of)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, backed by a memory map that lives as long as the tensor does.

        Raises:
            CheckpointError: the shard cannot be read.
        """
        path = self.folder / self.shard_of[name]
        try:
            # Opened anew each time: one long-lived map would keep every page that was ever read resident.
            with safe_open(path, framework="pt") as shard:
                tensor: torch.Tensor = shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read '{name}' from {path}: {error}") from error
        return tensor

    def digest(self) -> str:
        """``sha256:`` over name and SHA-256 of every file, a line each as ``sha256sum`` prints them."""
        lines = [f"{_file_sha256(self.folder / name)}  {name}\n" for name in self.files]
        return "sha256:" + hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()


def shard_names(folder: Path) -> list[str]:
    """Sorted names of the files that hold the weights, as the folder says, whether they are there or not.

    Raises:
        CheckpointError: no safetensors checkpoint, or an index with a name that leaves the folder.
    """
    return _shards(folder)[0]


def _shards(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the safetensors files, and which tensor the index says is in which."""
    if (folder / SINGLE).exists():
        return [_safe_name(folder, SINGLE)], None
    if not (folder / INDEX).exists():
        raise CheckpointError(f"{folder} has no {SINGLE} and no {INDEX}; only safetensors are ever read")
    weight_map = _json_object(folder, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no weight_map")
    return [_safe_name(folder, name) for name in sorted(set(map(str, weight_map.values())))], weight_map


def _headers(folder: Path, shards: list[str]) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    tensors: dict[str, TensorInfo] = {}
    shard_of: dict[str, str] = {}
    for shard in shards:
        for name, info in _header(folder / shard).items():
            if name in tensors:
                raise CheckpointError(f"tensor '{name}' is stored twice, in {shard_of[name]} and {shard}")
            tensors[name], shard_of[name] = info, shard
    return tensors, shard_of


def _header(path: Path) -> dict[str, TensorInfo]:
    try:
        with safe_open(path, framework="pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 (not a dict)
            return {name: TensorInfo(one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}") from error


def _safe_name(folder: Path, name: str) -> str:
    if not _SHARD_NAME.fullmatch(name):
        raise CheckpointError(f"{name!r} is not the plain name of a safetensors file")
    _inside(folder, name)
    return name


def _inside(folder: Path, name: str) -> Path:
    """The file's path, unless a link leads out of the folder.

    A snapshot in the Hugging Face cache links to the blobs of the same repository: that stays inside.
    """
    home = folder.resolve()
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    target = (folder / name).resolve()
    if not any(target.is_relative_to(one) for one in allowed):
        raise CheckpointError(f"{folder / name} leads out of its folder")
    return folder / name


def _json_object(folder: Path, name: str) -> dict[str, Any]:
    path = _inside(folder, name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def _file_sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
