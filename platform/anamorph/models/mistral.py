"""Mistral 7B and others of `MistralForCausalLM`: Llama with a sliding window and no biases."""

from __future__ import annotations

from anamorph.models import decoder
from anamorph.models.options import KEEP
from anamorph.models.table import Family

MISTRAL = Family(
    id="mistral/1",
    architecture="MistralForCausalLM",
    model_type="mistral",
    sizes=decoder.SIZES,
    options={**decoder.OPTIONS, "sliding_window": KEEP},
    spaces=decoder.SPACES,
    tensors=(decoder.EMBEDDING, *decoder.WEIGHTS, decoder.FINAL_NORM, decoder.HEAD),
    norms=decoder.NORMS,
    tie=decoder.TIE,
    ignored=decoder.IGNORED,
    even=("head_dim",),
)
