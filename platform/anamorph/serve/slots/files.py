"""A replica's safetensors files, read into tensors that exist already, at the rate of a copy.

Not through a mapping: a page fault for each few kilobytes costs more than copying them, and what a
process has mapped counts as its memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from anamorph.errors import ReplicaRefused, SetupError
from anamorph.replica import CHUNK, StoredTensor, read_header

_TYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Two cores read at the rate of memory; more than a few threads read no faster.
_THREADS = min(4, os.cpu_count() or 1)
_PIECE = 8 * 2**20

Tensors = Mapping[str, torch.Tensor]
Piece = tuple[int, memoryview, int]


class Files:
    """The tensors of a folder's safetensors files: types and shapes now, bytes when they are wanted.

    Args:
        folder: of a verified replica.

    Raises:
        SetupError: there are none, or one cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.stored: dict[str, StoredTensor] = {}
        self._descriptors: dict[str, int] = {}
        self._closing = ExitStack()
        try:
            for path in sorted(folder.glob("*.safetensors")):
                self.stored.update(self._open(path))
        except BaseException as error:
            self.close()
            if isinstance(error, (ReplicaRefused, OSError)):
                raise SetupError(f"a safetensors file cannot be read: {type(error).__name__}") from error
            raise
        if not self.stored:
            self.close()
            raise SetupError("the replica has no safetensors files; a pool reads no others")

    def _open(self, path: Path) -> Mapping[str, StoredTensor]:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._closing.callback(os.close, descriptor)
        self._descriptors[path.name] = descriptor
        return read_header(path.name, os.pread(descriptor, CHUNK, 0), os.fstat(descriptor).st_size)

    @property
    def shapes(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """Type and shape of each tensor."""
        return {name: (_TYPES[one.dtype], torch.Size(one.shape)) for name, one in self.stored.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(one.nbytes for one in self.stored.values())

    def empty(self) -> dict[str, torch.Tensor]:
        """New tensors on the CPU for all of them, not filled."""
        return {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in self.shapes.items()}

    def read_into(self, targets: Tensors) -> int:
        """Fill tensors of the same names and shapes, on the CPU; another type is converted.

        Returns:
            The bytes read.

        Raises:
            SetupError: a file ends early, or cannot be read; the targets then hold rubbish.
        """
        converted = {name: t for name, t in targets.items() if not self._fits(name, t)}
        between = {name: torch.empty(self.shapes[name][1], dtype=self.shapes[name][0]) for name in converted}
        pieces = [piece for name in self.stored for piece in self._pieces(name, {**targets, **between}[name])]
        with ThreadPoolExecutor(_THREADS) as readers:
            for _ in readers.map(_read, pieces):
                pass
        with torch.no_grad():
            for name, target in converted.items():
                target.copy_(between[name])
        return self.nbytes

    def _fits(self, name: str, target: torch.Tensor) -> bool:
        return target.dtype == _TYPES[self.stored[name].dtype] and target.is_contiguous()

    def _pieces(self, name: str, target: torch.Tensor) -> Iterator[Piece]:
        one = self.stored[name]
        numbers: Any = target.detach().view(-1).view(torch.uint8).numpy()
        room = memoryview(numbers)
        for begin in range(0, one.nbytes, _PIECE):
            yield self._descriptors[one.file], room[begin : begin + _PIECE], one.start + begin

    def close(self) -> None:
        """Close the files; twice does no harm."""
        self._closing.close()

    def __enter__(self) -> Files:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()


def _read(piece: Piece) -> None:
    descriptor, room, start = piece
    while room:
        try:
            count = os.preadv(descriptor, [room], start)
        except OSError as error:
            raise SetupError(f"a safetensors file cannot be read: {error.strerror}") from error
        if count == 0:
            raise SetupError("a safetensors file ends before its last tensor")
        room, start = room[count:], start + count
