"""What a checkpoint looks like, as data: one table per family."""

from __future__ import annotations

from anamorph.models.resolve import FAMILIES, Table, TensorInfo, table_for

__all__ = ["FAMILIES", "Table", "TensorInfo", "table_for"]
