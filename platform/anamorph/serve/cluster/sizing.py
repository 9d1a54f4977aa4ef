"""How much memory a model takes, from its folder: read once, never loaded.

An estimate from above: weights as they are stored or as the chosen type makes them, an
untied copy of a tied head, the cache of keys and values, and a fixed part for the process.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anamorph.wire.admin import Dtype

MIB = 2**20
# Code, buffers and activations of one engine process, beside weights and cache.
PROCESS_MIB = 512
# Tokens of one block of the engines' caches.
BLOCK_TOKENS = 32
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Size:
    """Of one replica, whole.

    Args:
        weights: bytes.
        token: bytes of keys and values that one token takes in the cache.
    """

    weights: int
    token: int

    def mib(self, *, num_blocks: int, ranks: int = 1, copies: int = 1) -> int:
        """MiB of one rank.

        Args:
            num_blocks: of each copy's cache.
            ranks: that weights and cache are cut into.
            copies: slots of a pool, each with a cache of its own.
        """
        cache = num_blocks * BLOCK_TOKENS * self.token
        return PROCESS_MIB + -(-(copies * (self.weights + cache) // ranks) // MIB)


def read_size(folder: Path, dtype: Dtype = "auto") -> Size | None:
    """The size of a model in a folder; ``None`` where it cannot be told."""
    try:
        config = json.loads((folder / "config.json").read_text())
        stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict) or not stored:
        return None
    kept = _BYTES.get(str(config.get("dtype") or config.get("torch_dtype")), 2)
    computed = kept if dtype == "auto" else _BYTES[dtype]
    head = _number(config, "vocab_size") * _number(config, "hidden_size") * computed
    weights = stored * computed // kept + (head if config.get("tie_word_embeddings") else 0)
    return Size(weights, _token(config) * computed)


def _token(config: dict[str, Any]) -> int:
    """Numbers that one token leaves in the cache: key and value of each layer and head."""
    heads = _number(config, "num_attention_heads") or 1
    width = _number(config, "head_dim") or _number(config, "hidden_size") // heads
    return (
        2 * _number(config, "num_hidden_layers") * (_number(config, "num_key_value_heads") or heads) * width
    )


def _number(config: dict[str, Any], name: str) -> int:
    value = config.get(name)
    return value if isinstance(value, int) else 0
