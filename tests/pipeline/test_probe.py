"""The probe: random ids, and continuations that rounding cannot turn."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from anamorph.checkpoint.probe import ProbeSize, make_probe, special_ids
from anamorph.keys import TenantKey
from anamorph.pipeline import fold


@pytest.fixture(scope="module")
def replica(base: Path, key: TenantKey, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("probe") / "out"
    fold(base, out, key)
    return out


def answer(replica: Path, prompt: tuple[int, ...], tokens: int, dtype: Any) -> tuple[int, ...]:
    model: Any = AutoModelForCausalLM.from_pretrained(replica, dtype=dtype)
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_expected_tokens_are_the_replicas_greedy_ones(replica: Path, dtype: Any) -> None:
    """Recomputed one prompt at a time, without a cache, in the served dtype: the same tokens."""
    probe = make_probe(replica, dtype=dtype)
    assert len(probe.prompts) == len(probe.expected) == 3
    for prompt, expected in zip(probe.prompts, probe.expected, strict=True):
        assert answer(replica, prompt, len(expected), dtype) == expected


def test_prompts_are_random_and_hold_no_special_id(replica: Path, key: TenantKey) -> None:
    """Every ordinary id can be drawn, no special one is, and two probes differ."""
    image = key.vocab_key().permutation(97)
    special = {int(image[token]) for token in (0, 1, 2)}
    many = make_probe(replica, size=ProbeSize(candidates=200, kept=200, prompt_tokens=16, new_tokens=1))
    drawn = {token for prompt in many.prompts for token in prompt}
    assert drawn == set(range(97)) - special
    assert make_probe(replica).prompts != make_probe(replica).prompts


def test_the_same_randomness_gives_the_same_probe(replica: Path) -> None:
    """Nothing but ``randbelow`` decides."""
    first, second = (make_probe(replica, randbelow=random.Random(5).randrange) for _ in range(2))
    assert first == second


def test_the_clearest_candidates_are_kept(replica: Path) -> None:
    """The least margin of what is kept is no smaller than that of a probe without choice."""
    choice = ProbeSize(candidates=40, kept=3)
    chosen = make_probe(replica, size=choice, randbelow=random.Random(5).randrange)
    everything = make_probe(
        replica, size=ProbeSize(candidates=40, kept=40), randbelow=random.Random(5).randrange
    )
    model: Any = AutoModelForCausalLM.from_pretrained(replica)

    def margin(prompt: tuple[int, ...], expected: tuple[int, ...]) -> float:
        logits = model(torch.tensor([prompt + expected])).logits[0, len(prompt) - 1 : -1].detach()
        top = logits.topk(2).values
        return float((top[:, 0] - top[:, 1]).min())

    kept = min(map(margin, chosen.prompts, chosen.expected))
    rest = zip(everything.prompts[3:], everything.expected[3:], strict=True)
    special = special_ids(model.config.to_dict())
    assert kept >= max(margin(*pair) for pair in rest if not special & set(pair[1])) - 1e-4


def test_special_ids_are_found_in_lists_too() -> None:
    """Fields named for token ids count, other integers do not."""
    config = {"eos_token_id": [4, 5], "bos_token_id": 1, "pad_token_id": None, "vocab_size": 9}
    assert special_ids(config | {"suppress_token_ids": [7]}) == {1, 4, 5, 7}
