"""Llama 1 to 3, SmolLM, TinyLlama and others of `LlamaForCausalLM`."""

from __future__ import annotations

from dataclasses import replace

from anamorph.models import decoder
from anamorph.models.options import DROP, FLAG, only
from anamorph.models.table import Family, bias

LLAMA = Family(
    id="llama/1",
    architecture="LlamaForCausalLM",
    model_type="llama",
    # The first Llama configurations knew no grouped heads: no key means one per query head.
    sizes={**decoder.SIZES, "kv_heads": replace(decoder.SIZES["kv_heads"], optional=True)},
    options={
        **decoder.OPTIONS,
        "attention_bias": FLAG,
        "mlp_bias": FLAG,
        "pretraining_tp": only(1),
        "rope_interleaved": only(False, fate="drop"),
        "is_llama_config": DROP,
    },
    spaces=decoder.SPACES,
    tensors=(
        decoder.EMBEDDING,
        *decoder.WEIGHTS,
        *decoder.qkv_biases(when="attention_bias"),
        bias(f"{decoder.ATTENTION}.o_proj", decoder.RESIDUAL, when="attention_bias"),
        bias(f"{decoder.MLP}.gate_proj", decoder.GATE, when="mlp_bias"),
        bias(f"{decoder.MLP}.up_proj", decoder.UP, when="mlp_bias"),
        bias(f"{decoder.MLP}.down_proj", decoder.RESIDUAL, when="mlp_bias"),
        decoder.FINAL_NORM,
        decoder.HEAD,
    ),
    norms=decoder.NORMS,
    tie=decoder.TIE,
    ignored=decoder.IGNORED,
    even=("head_dim",),
)
