"""Carry out one step of a plan: from stored tensors to a stored tensor, in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from anamorph.checkpoint.reader import Checkpoint
from anamorph.checkpoint.writer import DTYPES, nbytes
from anamorph.plan import Gain, Step, TransformPlan
from anamorph.plan.symmetry import Monomial, Symmetry, identity, is_identity

# Stored bytes of a piece: large enough for efficient products, small enough for a processor's cache.
PIECE_BYTES = 2**22
CACHED_LIFTS = 16
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

Move = tuple[Monomial, Symmetry]


class Evaluator:
    """Makes the tensors of a plan, on ``device``.

    Products are in float32 when a tensor is stored in 16 bits, whose rounding is far
    coarser, and in float64 otherwise. A step that only permutes stays in the stored type.
    """

    def __init__(self, checkpoint: Checkpoint, plan: TransformPlan, device: str = "cpu") -> None:
        self._checkpoint = checkpoint
        self._plan = plan
        self._device = torch.device(device)
        # Keyed by the symmetry itself: the residual's is lifted once for the whole model.
        self._lifted = lru_cache(maxsize=CACHED_LIFTS)(_lift)

    def pieces(self, step: Step) -> Iterator[torch.Tensor]:
        """The step's tensor in its stored dtype, as successive pieces of whole rows."""
        stored = DTYPES[step.dtype]
        if step.fill is not None:
            yield torch.full(step.shape, step.fill, dtype=stored)
            return
        moves = [self._split(step, dim) for dim in range(len(step.axes))]
        bits = self._checkpoint.read(step.source).view(BITS[stored.itemsize]).numpy()
        for rows in _pieces(step, *moves[0]):
            yield self._piece(step, bits, [rows, *moves[1:]])

    def _split(self, step: Step, dim: int) -> Move:
        """What moves a dimension: an order first, unless a gain of the old order comes before it."""
        symmetry = self._plan.action(step.axes[dim])
        gained = any(gain.dim == dim for gain in step.gains)
        return (identity(symmetry.size), symmetry) if gained else symmetry.split()

    def _piece(self, step: Step, bits: Any, moves: list[Move]) -> torch.Tensor:
        """Order the stored bits; only if anything else is to be done, turn them into numbers."""
        stored = DTYPES[step.dtype]
        for dim, (order, _) in enumerate(moves):
            bits = order.act(bits, dim)
        moved = torch.from_numpy(bits).view(stored)
        if not step.gains and all(is_identity(rest) for _, rest in moves):
            return moved
        array = moved.to(self._device, _working(stored), copy=True)
        for gain in step.gains:
            array *= self._gain(gain, array).reshape((-1,) + (1,) * (array.ndim - gain.dim - 1))
        for dim, (_, rest) in reversed(list(enumerate(moves))):
            array = self._lifted(rest, array.dtype, array.device).act(array, dim)
        return array.to(stored)

    def _gain(self, gain: Gain, like: torch.Tensor) -> torch.Tensor:
        return self._checkpoint.read(gain.tensor).to(like.device, like.dtype) + gain.offset


def _pieces(step: Step, order: Monomial, rest: Symmetry) -> Iterator[Move]:
    """Rows that are only ordered and scaled can be made a few at a time; others need all."""
    if not isinstance(rest, Monomial) or rest.source is not None:
        yield order, rest
        return
    height = PIECE_BYTES * step.shape[0] // nbytes(step) + 1
    for start in range(0, step.shape[0], height):
        stop = min(start + height, step.shape[0])
        yield order.rows(start, stop), rest.rows(start, stop).split()[1]


def _working(stored: torch.dtype) -> torch.dtype:
    return torch.float32 if stored.itemsize == 2 else torch.float64


def _lift(symmetry: Symmetry, dtype: torch.dtype, device: torch.device) -> Symmetry:
    def lift(array: Any) -> Any:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.to(device, dtype if tensor.is_floating_point() else torch.int64)

    return symmetry.lifted(lift)
