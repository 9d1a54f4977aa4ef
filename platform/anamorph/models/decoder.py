"""What Llama-like decoders share: RoPE attention with grouped heads, gated MLP, RMS norms.

Read top to bottom: the spaces, the axes as seen by the tensors, the tensors, the norms.
"""

from __future__ import annotations

from anamorph.models.groups import AnyOrder, GatedNeurons, HeadMaps, HeadOrder, Isometries, PairRotations
from anamorph.models.options import ACTIVATION, COMMON, KEEP, PARTIAL_ROTARY, ROPE, Rule
from anamorph.models.table import Norm, Ratio, Size, Space, Tensor, Tie, View, axis, bias, linear

SIZES = {
    "vocab": Size("vocab_size"),
    "hidden": Size("hidden_size"),
    "ffn": Size("intermediate_size"),
    "layers": Size("num_hidden_layers"),
    "heads": Size("num_attention_heads"),
    "kv_heads": Size("num_key_value_heads", default="heads"),
    "head_dim": Size("head_dim", default=Ratio("hidden", "heads"), optional=True),
    "copies": Size(None, default=Ratio("heads", "kv_heads")),
}

OPTIONS: dict[str, Rule] = {
    **COMMON,
    **{size.key: KEEP for size in SIZES.values() if size.key},
    "hidden_act": ACTIVATION,
    "rms_norm_eps": KEEP,
    "attention_dropout": KEEP,
    "rope_theta": KEEP,
    "rope_scaling": ROPE,
    "rope_parameters": ROPE,
    "partial_rotary_factor": PARTIAL_ROTARY,
    "original_max_position_embeddings": KEEP,
}

SPACES = (
    Space("vocab", AnyOrder("vocab")),
    Space("residual", Isometries("hidden")),
    Space("layers.{l}.heads", HeadOrder()),
    Space("layers.{l}.qk", PairRotations()),
    Space("layers.{l}.vo", HeadMaps()),
    Space("layers.{l}.ffn", GatedNeurons("ffn")),
)

VOCAB = axis(View("vocab"))
RESIDUAL = axis(View("residual"))
# Heads take their new places first: a head's block belongs to the place it has in the replica.
KEY = axis(View("layers.{l}.heads", "kv"), View("layers.{l}.qk", "kv"))
QUERY = axis(View("layers.{l}.heads", "query"), ~View("layers.{l}.qk", "query"))
VALUE = axis(View("layers.{l}.heads", "kv"), View("layers.{l}.vo", "kv"))
MIXED = axis(View("layers.{l}.heads", "query"), View("layers.{l}.vo", "query"))  # values, mixed by attention
GATE = axis(View("layers.{l}.ffn", "gate"))
UP = axis(View("layers.{l}.ffn", "up"))

ATTENTION = "model.layers.{l}.self_attn"
MLP = "model.layers.{l}.mlp"

EMBEDDING = Tensor("model.embed_tokens.weight", (VOCAB, RESIDUAL))
HEAD = linear("lm_head", VOCAB, RESIDUAL, when="!tie_word_embeddings")
TIE = Tie("tie_word_embeddings", tensor=HEAD, source="model.embed_tokens.weight")

WEIGHTS = (
    Tensor("model.layers.{l}.input_layernorm.weight", (RESIDUAL,)),
    linear(f"{ATTENTION}.q_proj", QUERY, RESIDUAL),
    linear(f"{ATTENTION}.k_proj", KEY, RESIDUAL),
    linear(f"{ATTENTION}.v_proj", VALUE, RESIDUAL),
    linear(f"{ATTENTION}.o_proj", RESIDUAL, MIXED),
    Tensor("model.layers.{l}.post_attention_layernorm.weight", (RESIDUAL,)),
    linear(f"{MLP}.gate_proj", GATE, RESIDUAL),
    linear(f"{MLP}.up_proj", UP, RESIDUAL),
    linear(f"{MLP}.down_proj", RESIDUAL, UP),
)
FINAL_NORM = Tensor("model.norm.weight", (RESIDUAL,))


def qkv_biases(when: str | None = None) -> tuple[Tensor, ...]:
    """Biases of the three projections into attention."""
    axes = {"q": QUERY, "k": KEY, "v": VALUE}
    return tuple(bias(f"{ATTENTION}.{name}_proj", out, when=when) for name, out in axes.items())


NORMS = (
    Norm(
        "model.layers.{l}.input_layernorm.weight",
        tuple(f"{ATTENTION}.{name}_proj.weight" for name in "qkv"),
    ),
    Norm(
        "model.layers.{l}.post_attention_layernorm.weight",
        (f"{MLP}.gate_proj.weight", f"{MLP}.up_proj.weight"),
    ),
    Norm("model.norm.weight", ("lm_head.weight",)),
)

# Saved by old checkpoints; the reference classes compute it from the configuration.
IGNORED = (f"{ATTENTION}.rotary_emb.inv_freq",)
