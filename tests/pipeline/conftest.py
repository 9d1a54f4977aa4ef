"""Tiny random Llama checkpoints, made once per session with transformers itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from anamorph.keys import TenantKey


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, grouped heads, a tied head and special ids; norms are random too."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.rand_like(weight) + 0.5 if "norm" in name else torch.randn_like(weight) * 0.3)
    folder = tmp_path_factory.mktemp("bases") / "org--secret-base-name"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def key() -> TenantKey:
    return TenantKey.from_root(bytes(range(32)), "acme", "tiny", 1)
