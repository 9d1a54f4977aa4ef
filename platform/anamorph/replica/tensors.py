"""Tensors and slices of a replica, read from wherever it lies without reading the rest.

The header of a safetensors file is part of its first chunk, so it is verified like
any other bytes; its content is checked here because lengths and offsets in it are used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from anamorph.errors import ReplicaRefused
from anamorph.replica.contents import INDEX, MAX_JSON, check_json, check_safetensors_header
from anamorph.replica.manifest import CHUNK
from anamorph.replica.ranged import RangedReplica

WIDTH = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
"""Bytes of one number, of every type that a fold writes."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: ``start`` counts from the beginning of ``file``, in bytes."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first axis."""
        return math.prod(self.shape[1:]) * WIDTH[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * WIDTH[self.dtype]


class Tensors:
    """The tensors of one replica, by name.

    Raises:
        ReplicaRefused: a header or the index that cannot be true, or bytes that the manifest does not know.
        StoreUnavailable: the store does not answer.
    """

    def __init__(self, replica: RangedReplica) -> None:
        self._replica = replica
        self._headers: dict[str, Mapping[str, StoredTensor]] = {}
        self._shard_of = self._index()

    def names(self) -> list[str]:
        """Sorted names of all tensors."""
        return sorted(self._shard_of)

    def find(self, name: str) -> StoredTensor:
        """Type, shape and place of a tensor."""
        shard = self._shard_of.get(name)
        if shard is None or name not in self._header(shard):
            raise ReplicaRefused(f"the replica holds no tensor {name[:300]!r}")
        return self._header(shard)[name]

    def read(self, name: str, *index: slice) -> Bytes:
        """A tensor or a part of it, as bytes.

        Only the rows that ``index[0]`` names are fetched; the other axes are cut in memory.

        Args:
            name: of the tensor.
            index: a slice with step 1 for each leading axis; all of an axis by default.

        Returns:
            The part's shape, with the last axis in bytes: ``torch.from_numpy(found).view(torch.bfloat16)``
            has the shape of the part itself. A scalar has the shape (bytes of one number,).
        """
        tensor = self.find(name)
        if len(index) > len(tensor.shape) or any(part.step not in (None, 1) for part in index):
            raise ValueError("one slice of step 1 for each axis of the tensor, at most")
        width, shape = WIDTH[tensor.dtype], tensor.shape or (1,)
        parts = [slice(*part.indices(size)) for part, size in zip(index, shape, strict=False)]
        rows = parts[0] if parts else slice(0, shape[0])
        count, row = max(rows.stop - rows.start, 0), math.prod(shape[1:]) * width
        start = tensor.start + rows.start * row
        data = np.frombuffer(self._replica.read(tensor.file, start, start + count * row), np.uint8)
        numbers = data.reshape(count, *shape[1:], width)  # (rows, ..., n, bytes)
        cut = numbers[(slice(None), *parts[1:])]
        return np.ascontiguousarray(cut).reshape(*cut.shape[:-2], cut.shape[-2] * width)

    def _index(self) -> dict[str, str]:
        shards = [name for name in self._replica.manifest.files if name.endswith(".safetensors")]
        if INDEX not in self._replica.manifest.files:
            return {name: shard for shard in shards for name in self._header(shard)}
        size = self._replica.size(INDEX)
        if size > MAX_JSON:
            raise ReplicaRefused(f"{INDEX} is longer than {MAX_JSON} bytes")
        content = self._replica.read(INDEX, 0, size)
        check_json(INDEX, content)
        return dict(json.loads(content)["weight_map"])

    def _header(self, shard: str) -> Mapping[str, StoredTensor]:
        if shard not in self._headers:
            size = self._replica.size(shard)
            self._headers[shard] = read_header(shard, self._replica.read(shard, 0, min(CHUNK, size)), size)
        return self._headers[shard]


def read_header(shard: str, first: bytes, size: int) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file.

    Args:
        shard: the file's name.
        first: its first chunk.
        size: bytes of the whole file.

    Raises:
        ReplicaRefused: a header that cannot be true.
    """
    check_safetensors_header(shard, first)
    length = int.from_bytes(first[:8], "little")
    fields = json.loads(first[8 : 8 + length])
    fields.pop("__metadata__", None)
    return {name: _stored(shard, one, 8 + length, size) for name, one in fields.items()}


def _stored(shard: str, fields: Any, data: int, size: int) -> StoredTensor:
    """One entry of a header, if it can be true; ``data`` is where the file's data begins."""
    try:
        dtype, shape, (start, stop) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, start, stop))
        right = whole and stop - start == math.prod(shape) * WIDTH[dtype] and data + stop <= size
    except (KeyError, TypeError, ValueError):
        right = False
    if not right:
        raise ReplicaRefused(f"{shard} has a tensor in its header that cannot be true")
    return StoredTensor(shard, dtype, shape, data + start)
