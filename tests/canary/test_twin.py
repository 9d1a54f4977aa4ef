"""A twin has the shapes of its base, random weights, and nothing that tells of the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from anamorph.canary import twin
from anamorph.errors import CheckpointError, SetupError


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A small Llama in bfloat16, in two files, with special ids."""
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=11,
        eos_token_id=[12, 13],
        attention_bias=True,
    )
    folder = tmp_path / "base"
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="40KB")
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stream:
            found |= {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    return found


def contents(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(folder.glob("*.safetensors"))]


def test_shapes_and_types_of_the_base(base: Path, tmp_path: Path) -> None:
    """Every tensor is there, in the same file, with its shape and type."""
    made = twin(base, tmp_path / "twin")
    before, after = tensors(base), tensors(made)
    assert len(list(base.glob("*.safetensors"))) > 1
    assert {n: (t.shape, t.dtype) for n, t in after.items()} == {
        n: (t.shape, t.dtype) for n, t in before.items()
    }


def test_weights_are_finite_and_not_the_bases(base: Path, tmp_path: Path) -> None:
    """Nothing of the base's matrices is in it, and no value is infinite."""
    before, after = tensors(base), tensors(twin(base, tmp_path / "twin"))
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    matrices = [name for name, tensor in after.items() if tensor.ndim == 2]
    shared = [(after[name] == before[name]).float().mean().item() for name in matrices]
    assert max(shared) < 0.05
    spread = [after[n].float().std().item() * after[n].shape[-1] ** 0.5 for n in matrices]
    assert min(spread) > 0.8
    assert max(spread) < 1.2


def test_it_runs(base: Path, tmp_path: Path) -> None:
    """Stock transformers loads it and computes finite logits."""
    model = AutoModelForCausalLM.from_pretrained(twin(base, tmp_path / "twin"), dtype="auto")
    with torch.no_grad():
        logits = model(torch.randint(0, 96, (1, 20))).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0


def test_special_ids_stay_at_home(base: Path, tmp_path: Path) -> None:
    """Ids of special tokens are known plaintext; where the base comes from is nobody's matter."""
    config = json.loads((base / "config.json").read_text()) | {"_name_or_path": "acme/secret-base"}
    (base / "config.json").write_text(json.dumps(config))
    told = json.loads((twin(base, tmp_path / "twin") / "config.json").read_text())
    assert {name: value for name, value in told.items() if name.endswith("_token_id")} == {
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    assert "secret-base" not in json.dumps(told)
    assert told["hidden_size"] == 32


def test_a_seed_repeats(base: Path, tmp_path: Path) -> None:
    """The same seed gives the same bytes, and without one they differ."""
    one, two = twin(base, tmp_path / "1", seed=7), twin(base, tmp_path / "2", seed=7)
    other = twin(base, tmp_path / "3")
    for file in base.glob("*.safetensors"):
        assert (one / file.name).read_bytes() == (two / file.name).read_bytes()
    assert any(
        (one / f.name).read_bytes() != (other / f.name).read_bytes() for f in base.glob("*.safetensors")
    )


@pytest.mark.parametrize("damage", [b"", b"\x05\0\0\0\0\0\0\0nope!", b"\xff" * 40])
def test_damaged_files_are_refused(base: Path, tmp_path: Path, damage: bytes) -> None:
    """What is no safetensors file is refused, and nothing is left behind."""
    sorted(base.glob("*.safetensors"))[-1].write_bytes(damage)
    with pytest.raises(CheckpointError, match="no safetensors file"):
        twin(base, tmp_path / "twin")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_quantised_weights_are_refused(base: Path, tmp_path: Path) -> None:
    """Integers have no random values that mean anything."""
    save_file({"packed": torch.zeros(4, dtype=torch.int8)}, base / "extra.safetensors")
    with pytest.raises(CheckpointError, match="I8"):
        twin(base, tmp_path / "twin")


@pytest.mark.parametrize("missing", ["config.json", "*.safetensors"])
def test_no_checkpoint(base: Path, tmp_path: Path, missing: str) -> None:
    """A folder that is none is refused, as is a place that is taken."""
    for path in base.glob(missing):
        path.unlink()
    with pytest.raises(SetupError):
        twin(base, tmp_path / "twin")


def test_never_over_something_else(base: Path, tmp_path: Path) -> None:
    """An existing folder is left as it is."""
    with pytest.raises(SetupError, match="exists"):
        twin(base, tmp_path)
