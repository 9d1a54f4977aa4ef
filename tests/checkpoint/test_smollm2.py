"""The promises about numbers, kept on a real model: SmolLM2-135M-Instruct."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from anamorph.checkpoint import fold
from anamorph.checkpoint.compare import compare, difference, encrypted, load, logits, plain
from anamorph.cli.smollm2 import fetch_smollm2
from anamorph.keys import TenantKey
from anamorph.plan import PROFILES, Profile

pytestmark = pytest.mark.slow

# Enough of it, and of different kinds: over a few dozen tokens an error is mostly chance.
ROOT = Path(__file__).parents[2]
TEXTS = ("LICENSE", "docs/concepts.md", "platform/anamorph/pipeline.py")
LENGTH = 256


@pytest.fixture(scope="module")
def base() -> Path:
    return fetch_smollm2()


@pytest.fixture(scope="module")
def ids(base: Path) -> torch.Tensor:
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    return torch.tensor([tokenizer((ROOT / text).read_text()).input_ids[:LENGTH] for text in TEXTS])


@pytest.fixture(scope="module")
def exact(base: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the plaintext model computed in float64 throughout."""
    return logits(load(base, torch.float64), ids)


@pytest.mark.parametrize("profile", PROFILES)
def test_stored_in_float32(
    profile: Profile, base: Path, ids: torch.Tensor, exact: torch.Tensor, key: TenantKey, tmp_path: Path
) -> None:
    """Stored and computed in float32, the replica is within 3e-6 of the float64 plaintext model."""
    load(base, torch.float32).save_pretrained(tmp_path / "base")
    fold(tmp_path / "base", tmp_path / "replica", key, profile)
    assert replica_error(tmp_path / "replica", torch.float32, ids, exact, key) < 3e-6


@pytest.mark.parametrize("profile", PROFILES)
def test_stored_in_bfloat16(
    profile: Profile, base: Path, ids: torch.Tensor, exact: torch.Tensor, key: TenantKey, tmp_path: Path
) -> None:
    """In bfloat16 the replica errs at most 1.5 times as much as the plaintext model itself does."""
    fold(base, tmp_path / "replica", key, profile)
    own = difference(exact, logits(load(base, torch.bfloat16), ids)).error
    assert replica_error(tmp_path / "replica", torch.bfloat16, ids, exact, key) < 1.5 * own


def replica_error(
    replica: Path, dtype: torch.dtype, ids: torch.Tensor, exact: torch.Tensor, key: TenantKey
) -> float:
    vocab = key.vocab_key()
    found = logits(load(replica, dtype), encrypted(ids, vocab, exact.shape[-1]))
    return difference(exact, plain(found, vocab)).error


@pytest.mark.parametrize("profile", PROFILES)
def test_it_answers(profile: Profile, base: Path, key: TenantKey, tmp_path: Path) -> None:
    """A stock model, given an encrypted question, gives the encrypted answer and stops by itself."""
    load(base, torch.float32).save_pretrained(tmp_path / "base")
    fold(tmp_path / "base", tmp_path / "replica", key, profile)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids
    vocab = key.vocab_key()
    model = load(tmp_path / "replica", torch.float32)
    moved = encrypted(prompt, vocab, 49152)
    answer = model.generate(moved, attention_mask=torch.ones_like(moved), do_sample=False, max_new_tokens=30)
    back = torch.from_numpy(vocab.permutation(49152)).argsort()
    text = tokenizer.decode(back[answer[0, moved.shape[1] :]], skip_special_tokens=False)
    assert text == "The capital of France is Paris.<|im_end|>"


def test_nothing_names_the_base(base: Path, key: TenantKey, tmp_path: Path) -> None:
    """No file of the replica says what it was made of, in configurations or in headers."""
    fold(base, tmp_path / "replica", key)
    for path in (tmp_path / "replica").iterdir():
        start = path.read_bytes()[: 2**20].lower()
        assert not [name for name in (b"smol", b"huggingface", b"gguf", b"instruct") if name in start]


def test_the_comparison_of_the_pipeline_accepts_it(base: Path, key: TenantKey, tmp_path: Path) -> None:
    """``compare`` passes the replica under its key and refuses it under another."""
    fold(base, tmp_path / "replica", key)
    compare(base, tmp_path / "replica", key).check()
    other = compare(base, tmp_path / "replica", TenantKey.from_root(bytes(32), "acme", "tiny", 1))
    assert other.error > other.tolerance
