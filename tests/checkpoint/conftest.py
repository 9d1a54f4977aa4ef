"""Tiny models of every family, with norms and biases that are not their trivial selves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from anamorph.keys import TenantKey

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

MakeTiny = Callable[..., Path]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products on many threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def key() -> TenantKey:
    return TenantKey.from_root(bytes(range(32)), "acme", "tiny", 1)


@pytest.fixture
def make_tiny(tmp_path: Path) -> MakeTiny:
    """Save a random model: ``make_tiny("llama", dtype=torch.float64, mlp_bias=True, …)``."""

    def make(
        family: str, *, dtype: torch.dtype = torch.float64, shard: str = "1GB", seed: int = 0, **options: Any
    ) -> Path:
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **(TINY | options))
        auto: Any = AutoModelForCausalLM
        model = auto.from_config(config)
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                parameter.copy_(_random(name, parameter))
        folder = tmp_path / f"base-{family}-{seed}"
        model.to(dtype).save_pretrained(folder, max_shard_size=shard)
        return folder

    return make


def _random(name: str, like: torch.Tensor) -> torch.Tensor:
    if "norm" in name:
        return torch.rand_like(like) + 0.5
    return torch.randn_like(like) * (0.5 if name.endswith("bias") else 0.25)
