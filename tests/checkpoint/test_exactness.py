"""A replica computes what its base computes: every option, both profiles, stock classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from anamorph.checkpoint import fold
from anamorph.checkpoint.compare import Comparison, difference, encrypted, load, logits, plain
from anamorph.keys import TenantKey
from anamorph.models.options import ROPE_TYPES
from anamorph.plan import PROFILES, Profile

ROPE: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "proportional": {"rope_type": "proportional", "factor": 2.0, "partial_rotary_factor": 0.5},
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-attention-bias": ("llama", {"attention_bias": True}),
    "llama-mlp-bias": ("llama", {"mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 12}),
    "llama-gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama-everything": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 6, "tie_word_embeddings": True},
    ),
    **{
        f"llama-{name}": (
            "llama",
            {"rope_parameters": {"rope_theta": 100.0, **rope}, "max_position_embeddings": 24},
        )
        for name, rope in ROPE.items()
    },
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "mistral-head-dim-tied": ("mistral", {"head_dim": 10, "tie_word_embeddings": True, "sliding_window": 7}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-head-dim": ("qwen2", {"head_dim": 12}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2-layer-types": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen2-yarn": ("qwen2", {"rope_parameters": {"rope_theta": 100.0, **ROPE["yarn"]}}),
}


def ids(length: int = 30, batch: int = 2) -> torch.Tensor:
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(7))


def compared(base: Path, replica: Path, key: TenantKey, dtype: torch.dtype) -> Comparison:
    expected = logits(load(base, dtype), ids())
    found = logits(load(replica, dtype), encrypted(ids(), key.vocab_key(), 96))
    return difference(expected, plain(found, key.vocab_key()))


def test_every_rope_type_is_a_case() -> None:
    """What transformers knows, tables cover, and each is compared below; ``default`` in the other cases."""
    assert set(ROPE_INIT_FUNCTIONS) == set(ROPE) == set(ROPE_TYPES) - {"default"}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("case", CASES)
def test_float64_logits_agree(
    case: str, profile: Profile, make_tiny: Callable[..., Path], key: TenantKey, tmp_path: Path
) -> None:
    """Stored and computed in float64, base and replica agree to 1e-9 for every option of every family."""
    family, options = CASES[case]
    base = make_tiny(family, **options)
    fold(base, tmp_path / "replica", key, profile)
    assert compared(base, tmp_path / "replica", key, torch.float64).error < 1e-9


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("case", CASES)
def test_greedy_generation_agrees(
    case: str, profile: Profile, make_tiny: Callable[..., Path], key: TenantKey, tmp_path: Path
) -> None:
    """Stock generate() on the replica gives the base's tokens, encrypted, and stops where the base stops."""
    family, options = CASES[case]
    base = make_tiny(family, **options)
    fold(base, tmp_path / "replica", key, profile)
    vocab = key.vocab_key()
    prompt = ids(12)
    expected = generate(base, prompt)
    found = generate(tmp_path / "replica", encrypted(prompt, vocab, 96))
    assert torch.equal(encrypted(expected, vocab, 96), found)


def generate(folder: Path, prompt: torch.Tensor) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokens: torch.Tensor = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20
    )
    return tokens


@pytest.mark.parametrize("profile", PROFILES)
def test_a_permuted_replica_holds_the_bytes_of_its_base(
    profile: Profile, make_tiny: Callable[..., Path], key: TenantKey, tmp_path: Path
) -> None:
    """``permute`` moves stored numbers and rounds none; ``rotate`` (the control) has other numbers."""
    base = make_tiny("llama", dtype=torch.bfloat16)
    fold(base, tmp_path / "replica", key, profile)
    same = all(
        torch.equal(before.flatten().sort().values, after.flatten().sort().values)
        for before, after in zip(
            load(base, torch.bfloat16).state_dict().values(),
            load(tmp_path / "replica", torch.bfloat16).state_dict().values(),
            strict=True,
        )
    )
    assert same == (profile == "permute")


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 2e-6), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)]
)
@pytest.mark.parametrize("profile", PROFILES)
def test_the_stored_type_is_kept(
    dtype: torch.dtype,
    limit: float,
    profile: Profile,
    make_tiny: Callable[..., Path],
    key: TenantKey,
    tmp_path: Path,
) -> None:
    """A replica is stored in its base's type, and its float64 logits are that type's rounding away."""
    base = make_tiny("qwen2", dtype=dtype)
    fold(base, tmp_path / "replica", key, profile)
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "replica", dtype="auto")
    assert {parameter.dtype for parameter in stored.parameters()} == {dtype}
    assert compared(base, tmp_path / "replica", key, torch.float64).error < limit


@pytest.mark.parametrize("profile", PROFILES)
def test_another_key_is_no_key(
    profile: Profile, make_tiny: Callable[..., Path], key: TenantKey, tmp_path: Path
) -> None:
    """Read with another key, a replica's logits are noise: the exactness tests can fail."""
    base = make_tiny("llama")
    fold(base, tmp_path / "replica", key, profile)
    other = TenantKey.from_root(bytes(32), "acme", "tiny", 1)
    assert compared(base, tmp_path / "replica", other, torch.float64).error > 0.5


def test_a_changed_weight_shows(make_tiny: Callable[..., Path], key: TenantKey, tmp_path: Path) -> None:
    """One weight changed by a millionth is seen by the comparison: 1e-9 is not satisfied by anything."""
    base, other = make_tiny("llama"), tmp_path / "other"
    model = load(base, torch.float64)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] += 1e-6
    model.save_pretrained(other)
    fold(other, tmp_path / "replica", key)
    assert compared(base, tmp_path / "replica", key, torch.float64).error > 1e-9


@pytest.mark.parametrize("profile", PROFILES)
def test_old_rope_options_are_carried_over(
    profile: Profile, make_tiny: Callable[..., Path], key: TenantKey, tmp_path: Path
) -> None:
    """A configuration with ``rope_theta`` and ``rope_scaling`` folds, and keeps both as they were."""
    base = make_tiny("llama", rope_parameters={"rope_theta": 500.0, **ROPE["linear"]})
    config = json.loads((base / "config.json").read_text())
    del config["rope_parameters"]
    old = {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (base / "config.json").write_text(json.dumps(config | old))
    fold(base, tmp_path / "replica", key, profile)
    rewritten = json.loads((tmp_path / "replica" / "config.json").read_text())
    assert {name: rewritten[name] for name in old} == old
    assert compared(base, tmp_path / "replica", key, torch.float64).error < 1e-9


@pytest.mark.parametrize("profile", PROFILES)
def test_many_shards(
    profile: Profile, make_tiny: Callable[..., Path], key: TenantKey, tmp_path: Path
) -> None:
    """A sharded base folds into a sharded replica of any other size, with an index that stock code reads."""
    base = make_tiny("llama", shard="20KB", tie_word_embeddings=True)
    assert len(list(base.glob("*.safetensors"))) > 3
    fold(base, tmp_path / "replica", key, profile, max_shard_size=15_000)
    assert len(list((tmp_path / "replica").glob("model-*-of-*.safetensors"))) > 3
    assert compared(base, tmp_path / "replica", key, torch.float64).error < 1e-9
