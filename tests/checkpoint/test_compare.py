"""The comparison measures what it says, and its check can fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from anamorph.checkpoint import compare, fold
from anamorph.checkpoint.compare import Comparison, InDouble, difference
from anamorph.errors import MaterializationError
from anamorph.keys import TenantKey

Make = Callable[..., Path]


def test_equal_logits_do_not_differ() -> None:
    """Equal logits: no error, no divergence, no differing token."""
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    assert difference(logits, logits) == Comparison(0.0, 0.0, None, 0.0)


def test_the_first_differing_token_is_the_earliest_of_the_batch() -> None:
    """Positions count from the start, over all rows."""
    base = torch.zeros(2, 4, 3)
    base[..., 0] = 1.0
    other = base.clone()
    other[0, 3, 1] = other[1, 2, 2] = 2.0
    assert difference(base, other).first_difference == 2


def test_kl_is_that_of_the_distributions() -> None:
    """A hand-computed divergence: (1/2, 1/2) against (3/4, 1/4)."""
    base, other = torch.zeros(1, 1, 2), torch.tensor([[[math.log(3.0), 0.0]]])
    assert difference(base, other).kl == pytest.approx(0.5 * math.log(4 / 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_good_replica_passes_and_a_foreign_one_fails(
    dtype: torch.dtype, make_tiny: Make, key: TenantKey, tmp_path: Path
) -> None:
    """The tolerance admits rounding of the stored type, and not another key's replica."""
    base = make_tiny("mistral", dtype=dtype)
    fold(base, tmp_path / "good", key)
    fold(base, tmp_path / "foreign", TenantKey.from_root(bytes(32), "acme", "tiny", 1))
    compare(base, tmp_path / "good", key).check()
    with pytest.raises(MaterializationError):
        compare(base, tmp_path / "foreign", key).check()


def test_no_number_is_no_agreement() -> None:
    """Logits that are not numbers fail the check."""
    broken = difference(torch.ones(1, 1, 2), torch.full((1, 1, 2), math.nan), tolerance=0.1)
    with pytest.raises(MaterializationError):
        broken.check()


def test_double_stays_double() -> None:
    """Inside the mode a float64 tensor is not rounded to float32 on the way; outside it is."""
    third = torch.tensor([1.0], dtype=torch.float64) / 3
    rounded = third.to(torch.float32).double()
    with InDouble():
        kept = [third.to(torch.float32), third.float(), third.to(dtype=torch.float32)]
        softmax = torch.nn.functional.softmax(third, dim=0, dtype=torch.float32)
    assert all(torch.equal(one, third) for one in kept)
    assert softmax.dtype == torch.float64
    assert not torch.equal(rounded, third)


def test_other_types_are_left_alone() -> None:
    """The mode touches nothing but float64."""
    with InDouble():
        assert torch.ones(1, dtype=torch.bfloat16).to(torch.float32).dtype == torch.float32
        assert torch.ones(1, dtype=torch.int64).float().dtype == torch.float32
