"""Qwen2 and Qwen2.5 of `Qwen2ForCausalLM`: biases on q, k, v; windows on some layers."""

from __future__ import annotations

from anamorph.models import decoder
from anamorph.models.options import FLAG, KEEP, each, only
from anamorph.models.table import Family

QWEN2 = Family(
    id="qwen2/1",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    sizes=decoder.SIZES,
    options={
        **decoder.OPTIONS,
        "use_sliding_window": FLAG,
        "sliding_window": KEEP,
        "max_window_layers": KEEP,
        "layer_types": each("full_attention", "sliding_attention"),
        # Qwen's configurations carry this one, and the reference class has no such switch.
        "use_mrope": only(False, fate="drop"),
    },
    spaces=decoder.SPACES,
    tensors=(
        decoder.EMBEDDING,
        *decoder.WEIGHTS,
        *decoder.qkv_biases(),
        decoder.FINAL_NORM,
        decoder.HEAD,
    ),
    norms=decoder.NORMS,
    tie=decoder.TIE,
    ignored=decoder.IGNORED,
    even=("head_dim",),
)
