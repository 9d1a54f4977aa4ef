"""How far a replica's logits are from the plaintext model's.

    python benchmarks/exactness.py [--device cpu|cuda] [--json FILE]

SmolLM2-135M-Instruct on three texts of 512 tokens (a licence, documentation, code), under
three random keys. Every error is relative to the plaintext model computed in float64
throughout; the plaintext model's own error in the same type stands beside it, for that is
the floor. Type means stored and computed in it. The first 64 positions are shown by
themselves: a short prompt has no others, and there the errors spread most.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from anamorph.checkpoint import fold
from anamorph.checkpoint.compare import Comparison, difference, encrypted, load, logits, plain
from anamorph.cli.smollm2 import fetch_smollm2
from anamorph.keys import TenantKey
from anamorph.plan import PROFILES, Profile

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KEYS = 3
ROOT = Path(__file__).parent.parent
TEXTS = ("LICENSE", "docs/concepts.md", "platform/anamorph/pipeline.py")
LENGTH = 512
SHORT = 64


@dataclass(frozen=True)
class Errors:
    """One replica against float64: all positions, and the first ``SHORT`` of each text."""

    whole: Comparison
    short: Comparison


def errors(exact: torch.Tensor, found: torch.Tensor) -> Errors:
    """Compare logits (texts, positions, vocabulary)."""
    return Errors(difference(exact, found), difference(exact[:, :SHORT], found[:, :SHORT]))


def replica_difference(
    base: Path,
    profile: Profile,
    dtype: torch.dtype,
    ids: torch.Tensor,
    exact: torch.Tensor,
    folder: Path,
    device: str,
) -> Errors:
    """Fold under a fresh key and compare."""
    key = TenantKey.generate("acme", "smollm2", 1)
    fold(base, folder, key, profile)
    vocab = key.vocab_key()
    found = logits(load(folder, dtype, device), encrypted(ids, vocab, exact.shape[-1]))
    return errors(exact, plain(found, vocab))


def row(what: str, name: str, found: list[Errors]) -> dict[str, Any]:
    """Median and worst of several keys."""
    whole = [one.whole.error for one in found]
    return {
        "model": what,
        "type": name,
        "keys": len(found),
        "error_median": statistics.median(whole),
        "error_worst": max(whole),
        "error_first_64_worst": max(one.short.error for one in found),
        "kl_median": statistics.median(one.whole.kl for one in found),
    }


def measure(scratch: Path, device: str) -> list[dict[str, Any]]:
    """One row per model and type."""
    source = fetch_smollm2()
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    ids = torch.tensor([tokenizer((ROOT / text).read_text()).input_ids[:LENGTH] for text in TEXTS])
    exact = logits(load(source, torch.float64, device), ids)
    rows = []
    for name, dtype in TYPES.items():
        base = scratch / name
        model = load(source, dtype, device)
        model.save_pretrained(base)
        rows.append(row("plaintext", name, [errors(exact, logits(model, ids))]))
        for profile in PROFILES:
            found = [
                replica_difference(
                    base, profile, dtype, ids, exact, scratch / f"{name}-{profile}-{number}", device
                )
                for number in range(KEYS)
            ]
            rows.append(row(profile, name, found))
    return rows


def main() -> None:
    """Measure, print, and write the JSON if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(Path(scratch), options.device)
    for one in rows:
        print(
            f"{one['type']:>9} {one['model']:>10}   error {one['error_median']:.2e}"
            f" (worst {one['error_worst']:.2e}, in the first {SHORT} {one['error_first_64_worst']:.2e})"
            f"   KL {one['kl_median']:.1e}"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
