"""Plan × base → replica folder: streaming, one tensor at a time; and does it compute the same."""

from __future__ import annotations

from anamorph.checkpoint.compare import Comparison, compare
from anamorph.checkpoint.fold import MAX_SHARD_SIZE, FoldReport, fold, fold_part, join_parts
from anamorph.checkpoint.reader import Checkpoint

__all__ = [
    "MAX_SHARD_SIZE",
    "Checkpoint",
    "Comparison",
    "FoldReport",
    "compare",
    "fold",
    "fold_part",
    "join_parts",
]
