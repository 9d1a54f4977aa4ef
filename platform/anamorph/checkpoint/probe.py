"""Random ids and the greedy continuation a replica gives: what "verified" is measured by.

A served replica computes in other batches, and perhaps with other kernels, than the
one here. So of many random prompts those are kept whose every step has a clear winner:
rounding cannot turn it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from anamorph.wire.admin import Dtype, Probe

Below = Callable[[int], int]
"""A uniform integer in [0, n), such as ``secrets.randbelow``."""


@dataclass(frozen=True)
class ProbeSize:
    """How many prompts are tried and kept, and the tokens of each and of its continuation.

    Of SmolLM2 in bfloat16, rounding moved the distance of the two best logits by up to 0.56 in 768 steps,
    and by more than 0.18 in one of twenty. The third best of 12 prompts over 8 steps had a least distance of
    0.12, that of 48 over 4 steps one of 0.62.
    """

    candidates: int = 64
    kept: int = 3
    prompt_tokens: int = 8
    new_tokens: int = 4


def make_probe(
    replica: Path,
    *,
    dtype: Dtype = "auto",
    device: str = "cpu",
    size: ProbeSize | None = None,
    randbelow: Below = secrets.randbelow,
) -> Probe:
    """Generate greedily with stock transformers, in the dtype that will be served.

    Args:
        replica: verified replica folder.
        dtype: serving dtype; ``auto`` is the stored one.
        device: torch device.
        size: how much to try and keep.
        randbelow: source of randomness. Prompts are uniform over the encrypted ids that are not special.
    """
    size = size or ProbeSize()
    model: Any = AutoModelForCausalLM.from_pretrained(
        replica, dtype=dtype, use_safetensors=True, trust_remote_code=False
    )
    model.to(device).eval()
    special = special_ids(model.config.to_dict()) | special_ids(model.generation_config.to_dict())
    prompts = torch.tensor(_prompts(model.config.vocab_size, special, size, randbelow), device=device)
    continuations, margins = _greedy(model, prompts, size.new_tokens)
    clean = [not special & set(ids) for ids in continuations.tolist()]
    best = sorted(range(size.candidates), key=lambda i: (clean[i], margins[i].item()), reverse=True)
    kept = best[: size.kept]
    return Probe(
        prompts=tuple(tuple(prompts[i].tolist()) for i in kept),
        expected=tuple(tuple(continuations[i].tolist()) for i in kept),
    )


def special_ids(config: dict[str, Any]) -> frozenset[int]:
    """Ids of every ``…_token_id`` and ``…_token_ids`` field, lists included."""
    fields = (value for name, value in config.items() if name.endswith(("_token_id", "_token_ids")))
    return frozenset(token for value in fields for token in _ints(value))


def _ints(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _ints(item)


def _prompts(vocab_size: int, special: frozenset[int], size: ProbeSize, randbelow: Below) -> list[list[int]]:
    ordinary = [token for token in range(vocab_size) if token not in special]
    return [
        [ordinary[randbelow(len(ordinary))] for _ in range(size.prompt_tokens)]
        for _ in range(size.candidates)
    ]


@torch.inference_mode()
def _greedy(model: Any, prompts: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy continuations (B, steps) of equally long prompts (B, T), and each one's least margin (B,).

    The margin of a step is the best logit less the second best. End of text does not stop it.
    """
    ids, cache = prompts, None
    margins = torch.full((len(prompts),), torch.inf, device=prompts.device)
    chosen = []
    for _ in range(steps):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        top = out.logits[:, -1].float().topk(2)  # values, indices: (B, 2)
        margins = torch.minimum(margins, top.values[:, 0] - top.values[:, 1])
        ids, cache = top.indices[:, :1], out.past_key_values
        chosen.append(ids)
    return torch.cat(chosen, dim=1), margins
