"""Sharded safetensors, written front to back so that no shard is ever held in memory.

The library can write a file only from tensors that all exist at once, so the format's
frame (header length, JSON header, data) is written here; the library reads it back.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from anamorph.checkpoint.reader import INDEX, SINGLE
from anamorph.errors import CheckpointError
from anamorph.plan import Step

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
PARTIAL = ".part"
# A cache line: on a CPU engines compute on the mapped file, and a value across two lines costs time.
ALIGNED = 64


@dataclass(frozen=True)
class Shard:
    """One output file and the steps whose tensors it holds, in the order of its data."""

    name: str
    steps: tuple[Step, ...]

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return len(_frame(self)) + sum(map(nbytes, self.steps))


def nbytes(step: Step) -> int:
    """Size of the step's tensor in bytes."""
    return math.prod(step.shape) * DTYPES[step.dtype].itemsize


def lay_out(steps: Sequence[Step], max_shard_size: int) -> tuple[Shard, ...]:
    """Fill shards in order up to ``max_shard_size`` bytes; a larger tensor has one to itself."""
    groups: list[list[Step]] = []
    room = 0
    for step in steps:
        if not groups or nbytes(step) > room:
            groups.append([])
            room = max_shard_size
        groups[-1].append(step)
        room -= nbytes(step)
    if len(groups) == 1:
        return (_shard(SINGLE, groups[0]),)
    count = len(groups)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return tuple(_shard(name, group) for name, group in zip(names, groups, strict=True))


def _shard(name: str, steps: Iterable[Step]) -> Shard:
    # The format allows no gaps: what fills its lines comes first and is aligned to them, and wide
    # types before others are aligned to their own width.
    return Shard(name, tuple(sorted(steps, key=lambda step: (nbytes(step) % ALIGNED != 0, -_width(step)))))


def _width(step: Step) -> int:
    return DTYPES[step.dtype].itemsize


def _frame(shard: Shard) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for step in shard.steps:
        start, end = end, end + nbytes(step)
        header[step.name] = {"dtype": step.dtype, "shape": step.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNED)
    return struct.pack("<Q", len(text)) + text


class ShardWriter:
    """Writes one shard; the file has its name only once it is complete and on disk.

    Use as a context manager, and call ``write`` with the tensors of ``shard.steps`` in
    order, whole or in pieces of whole rows.
    """

    def __init__(self, folder: Path, shard: Shard) -> None:
        self._path = folder / shard.name
        self._part = folder / (shard.name + PARTIAL)
        self._size = shard.size
        self._file = _sole(self._part)
        self._file.write(_frame(shard))

    def write(self, piece: torch.Tensor) -> None:
        """Append the bytes of ``piece``."""
        data = piece.detach().cpu().contiguous().reshape(-1)
        self._file.write(data.view(torch.uint8).numpy().data)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        try:
            if failure is None:
                self._complete()
                self._publish()
        finally:
            self._file.close()

    def _complete(self) -> None:
        self._file.flush()
        if self._file.tell() != self._size:
            raise CheckpointError(f"{self._path.name} has {self._file.tell()} bytes of {self._size}")
        os.fsync(self._file.fileno())

    def _publish(self) -> None:
        # Closed only afterwards: the lock keeps others from beginning the same file in between.
        if not _bears(self._file.fileno(), self._part):
            raise CheckpointError(f"{self._part.name} was taken away while it was written")
        self._part.rename(self._path)


def _sole(path: Path) -> BinaryIO:
    """An empty file to write, locked against a second process that would write the same one.

    Raises:
        CheckpointError: there is such a process, or it has just finished.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    file = os.fdopen(descriptor, "wb")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Renamed before this one had the lock, it would be the finished file.
        ours = _bears(descriptor, path)
    except BlockingIOError:
        ours = False
    if not ours:
        file.close()
        raise CheckpointError(f"another process writes {path.stem}; wait for it to finish")
    file.truncate()
    return file


def _bears(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON, on disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """The index of several shards; a single one needs none."""
    if len(shards) == 1:
        return
    total = sum(nbytes(step) for shard in shards for step in shard.steps)
    weight_map = {step.name: shard.name for shard in shards for step in shard.steps}
    write_json(
        folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    )
