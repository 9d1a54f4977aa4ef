"""A checkpoint is read from plain safetensors inside its folder, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from anamorph.checkpoint import Checkpoint
from anamorph.errors import CheckpointError

Make = Callable[..., Path]


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    """A folder whose weights are pickles is refused, and the error says why."""
    (tmp_path / "config.json").write_text("{}")
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../other.safetensors", "/etc/passwd", "sub/x.safetensors", ".hidden.safetensors", "weights.bin", "", 3],
)
def test_an_index_names_plain_files_only(name: object, make_tiny: Make) -> None:
    """Names that leave the folder, hide, or are no safetensors are refused before they are opened."""
    base = make_tiny("llama", shard="20KB")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = name
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="plain name"):
        Checkpoint.open(base)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "generation_config.json"])
def test_links_out_of_the_folder_are_refused(file: str, make_tiny: Make, tmp_path: Path) -> None:
    """A link to anywhere else is not followed."""
    base = make_tiny("llama")
    (base / file).rename(tmp_path / "elsewhere")
    (base / file).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="leads out"):
        Checkpoint.open(base)


def test_a_snapshot_of_the_hub_cache_is_read(make_tiny: Make, tmp_path: Path) -> None:
    """The Hugging Face cache links each file to a blob of the same repository: that is one folder."""
    base, repository = make_tiny("llama"), tmp_path / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in list(base.iterdir()):
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert Checkpoint.open(snapshot).read("model.norm.weight").shape == (32,)


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_truncated_shard_is_refused(cut: int, make_tiny: Make) -> None:
    """A shard that lost its end is not a checkpoint."""
    path = make_tiny("llama") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint.open(path.parent)


def test_index_and_shards_must_agree(make_tiny: Make) -> None:
    """A tensor that the index does not list, or lists elsewhere, is refused."""
    base = make_tiny("llama", shard="20KB")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        Checkpoint.open(base)


def test_a_tensor_stored_twice_is_refused(make_tiny: Make) -> None:
    """Two shards that both hold a tensor leave open which is meant."""
    base = make_tiny("llama", shard="20KB")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    save_file({"model.norm.weight": torch.ones(32)}, base / "again.safetensors")
    index["weight_map"]["extra"] = "again.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="stored twice"):
        Checkpoint.open(base)


@pytest.mark.parametrize("content", ["", "[]", "{", "\xff"])
def test_a_broken_configuration_is_refused(content: str, make_tiny: Make) -> None:
    """What is not a JSON object is no configuration."""
    base = make_tiny("llama")
    (base / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint.open(base)


def test_a_missing_folder_is_an_error_with_its_name(tmp_path: Path) -> None:
    """The error says which folder was looked for."""
    with pytest.raises(CheckpointError, match="nowhere"):
        Checkpoint.open(tmp_path / "nowhere")


def test_tensors_are_read_as_stored(make_tiny: Make) -> None:
    """Reading gives the stored type and values, also after the folder's other tensors were read."""
    checkpoint = Checkpoint.open(make_tiny("llama", dtype=torch.bfloat16))
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tuple(tensors[name].shape) == info.shape for name, info in checkpoint.tensors.items())
    assert float(tensors["model.norm.weight"].min()) >= 0.5
