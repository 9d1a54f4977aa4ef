"""Names of spaces that stand for a purpose are never those of an axis."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from anamorph.keys import derive
from anamorph.models import table_for

ROOT = Path(__file__).parents[2]
LITERAL = re.compile(r"\bsubkey\(\"([^\"]+)\"\)")
TINY: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
FAMILIES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_axis_has_a_purpose_name(family: str) -> None:
    """A family's spaces include ``vocab`` and no other reserved name: their subkeys never meet."""
    table = table_for({**TINY, "model_type": family, "architectures": [FAMILIES[family]]})
    assert set(table.spaces) & derive.PURPOSES == {"vocab"}


def test_every_purpose_in_the_source_is_reserved() -> None:
    """A subkey asked for by a fixed name, anywhere in the source, is one of the reserved names."""
    files = [file for top in ("platform", "keysvc", "operators") for file in (ROOT / top).rglob("*.py")]
    names = {name for file in files for name in LITERAL.findall(file.read_text(encoding="utf-8"))}
    assert "plan" in names
    assert names <= derive.PURPOSES
