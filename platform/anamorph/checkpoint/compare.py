"""Does a replica compute what its base computes? Logits side by side, in plain coordinates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from anamorph.checkpoint.reader import Checkpoint
from anamorph.errors import MaterializationError
from anamorph.keys import Stream, TenantKey, VocabKey

# What rounding to the stored type may do to the logits; another key, or a symmetry
# that does not commute, is off by the order of 1.
TOLERANCE = {"F64": 1e-9, "F32": 1e-4, "F16": 0.02, "BF16": 0.1}
BATCH, LENGTH = 2, 32


@dataclass(frozen=True)
class Comparison:
    """How far two models' logits for the same plain token ids are apart.

    Args:
        error: ‖replica - base‖ / ‖base‖ over all logits.
        kl: mean over positions of KL(base ‖ replica), in nats.
        first_difference: first position whose most likely next token differs, or ``None``.
        tolerance: the error that the stored type explains.
    """

    error: float
    kl: float
    first_difference: int | None
    tolerance: float

    def check(self) -> None:
        """Refuse what rounding does not explain.

        Raises:
            MaterializationError: the error is above the tolerance, or no number.
        """
        if not self.error <= self.tolerance:
            raise MaterializationError(
                f"the replica's logits are off by {self.error:.1e}; at most {self.tolerance:.0e} is rounding"
            )


class InDouble(TorchFunctionMode):
    """Keeps float64 tensors float64 where a model's code asks for float32.

    The reference classes compute norms and softmax in float32 whatever the model's
    type, which hides every difference below 1e-7. Inside this mode a model loaded in
    float64 computes in float64 throughout.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Drop the request for float32 from casts and from functions that take a dtype."""
        options = dict(kwargs or {})
        double = bool(args) and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64
        if double and func is torch.Tensor.float:
            return args[0]
        if double:
            args = [torch.float64 if one is torch.float32 else one for one in args]
            options = {name: torch.float64 if one is torch.float32 else one for name, one in options.items()}
        return func(*args, **options)


def load(folder: Path, dtype: torch.dtype, device: str = "cpu") -> Any:
    """The folder's model as the stock class loads it, ready for inference."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True
    )
    return model.to(device).eval()


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of ``model`` for ``ids`` (batch, length), in the model's type. Shape (batch, length, vocab)."""
    with torch.inference_mode(), InDouble():
        output: torch.Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return output.cpu()


def encrypted(ids: torch.Tensor, key: VocabKey, vocab_size: int) -> torch.Tensor:
    """Plain ids as the replica knows them."""
    return torch.from_numpy(key.permutation(vocab_size))[ids]


def plain(values: torch.Tensor, key: VocabKey) -> torch.Tensor:
    """A replica's logits in plain coordinates: the last dimension's order undone."""
    return values[..., torch.from_numpy(key.permutation(values.shape[-1]))]


def difference(base: torch.Tensor, replica: torch.Tensor, tolerance: float = 0.0) -> Comparison:
    """Compare logits (batch, length, vocab) of the same plain ids in the same coordinates."""
    base, replica = base.double(), replica.double()
    gap = torch.linalg.vector_norm(replica - base) / torch.linalg.vector_norm(base)
    expected, found = base.log_softmax(-1), replica.log_softmax(-1)
    kl = (expected.exp() * (expected - found)).sum(-1).mean()
    differing = (base.argmax(-1) != replica.argmax(-1)).any(0).nonzero()
    first = int(differing[0]) if len(differing) else None
    return Comparison(float(gap), float(kl), first, tolerance)


def compare(
    base: Path,
    replica: Path,
    key: TenantKey,
    *,
    ids: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> Comparison:
    """Run base and replica on the same plain ids, and compare their logits in plain coordinates.

    ``ids`` (batch, length) are drawn from the key unless given, so that nobody's prompt is
    used. Computes in ``dtype``: by default float64 for a base stored in float64, else
    float32. The two models are in memory one after the other.
    """
    stored = {info.dtype for info in Checkpoint.open(base).tensors.values()}
    dtype = dtype or (torch.float64 if stored == {"F64"} else torch.float32)
    model = load(base, dtype, device)
    ids = _random_ids(key, model.config.vocab_size) if ids is None else ids
    expected = logits(model, ids)
    del model
    vocab = key.vocab_key()
    found = logits(load(replica, dtype, device), encrypted(ids, vocab, expected.shape[-1]))
    return difference(expected, plain(found, vocab), max(TOLERANCE[one] for one in stored))


def _random_ids(key: TenantKey, vocab_size: int) -> torch.Tensor:
    uniforms = Stream(key.subkey("compare")).uniforms(BATCH * LENGTH)
    return torch.from_numpy((uniforms * vocab_size).astype("int64")).reshape(BATCH, LENGTH)
