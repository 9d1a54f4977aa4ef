"""A key, and the configurations and headers of small checkpoints that need no files."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings

from anamorph.keys import TenantKey
from anamorph.models import TensorInfo, table_for

# A deadline asserts on time, which says more about the machine than about the code.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


@pytest.fixture
def key() -> TenantKey:
    return TenantKey.from_root(bytes(range(32)), "acme", "tiny", 1)


@pytest.fixture
def config() -> dict[str, Any]:
    return dict(CONFIG)


@pytest.fixture
def tensors(config: dict[str, Any]) -> dict[str, TensorInfo]:
    """Headers that match ``config``."""
    table = table_for(config)
    return {
        name: TensorInfo("BF16", tuple(table.length(axis) for axis in tensor.axes))
        for name, tensor in table.tensors.items()
    }
