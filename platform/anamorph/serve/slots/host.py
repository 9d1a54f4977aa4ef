"""Replicas in host memory, from which slots are filled: mapped files, or pinned copies for a GPU."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from anamorph.errors import SetupError
from anamorph.replica import Held

Tensors = Mapping[str, torch.Tensor]


def mapped(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files, as views of mapped pages: nothing is read yet.

    Raises:
        SetupError: there are none, or a file cannot be read.
    """
    tensors: dict[str, torch.Tensor] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as shard:
                tensors.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise SetupError(f"a safetensors file cannot be read: {type(error).__name__}") from error
    if not tensors:
        raise SetupError("the replica has no safetensors files; a pool reads no others")
    return tensors


class _Pinned:
    """Copies of tensors in page-locked memory, which a GPU reads at the rate of its bus.

    Registered by hand: torch's own pinned allocator rounds up to a power of two.
    """

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        for tensor in self.tensors.values():
            _check(_cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))

    def close(self) -> None:
        for tensor in self.tensors.values():
            _check(_cudart().cudaHostUnregister(tensor.data_ptr()))
        self.tensors = {}


def new_stream(device: torch.device) -> Any:
    """A stream for copies beside a GPU's computing; None on a CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _check(status: Any) -> None:
    if int(status) != 0:
        raise SetupError(f"CUDA cannot pin host memory (error {int(status)}); lower host_bytes")


class HostMemory:
    """Replicas by key id; beyond ``limit`` bytes the least recently used ones are dropped.

    What is dropped comes back from its verified files at the next use. The replica in use
    is never dropped, so the bound is ``limit`` or one replica, whichever is more. Copying,
    forgetting and closing are one thread's; the others may add and ask.

    Args:
        limit: bytes.
        pinned: hold copies in page-locked memory instead of mapping the files.
    """

    def __init__(self, limit: int, *, pinned: bool = False) -> None:
        self._limit = limit
        self._pinned = pinned
        self._held: dict[str, Held] = {}
        self._open: OrderedDict[str, tuple[Tensors, _Pinned | None]] = OrderedDict()
        self._lock = threading.RLock()

    def add(self, key_id: str, held: Held) -> None:
        """Know a verified replica; it is held until ``forget``."""
        with self._lock:
            self._held[key_id] = held

    def copy_into(self, key_id: str, targets: Tensors, stream: Any = None) -> int:
        """Copy a replica into tensors of the same names and shapes; returns the bytes read.

        Raises:
            ReplicaRefused: its files changed since they were verified; the targets hold rubbish.
            SetupError: they cannot be read.
        """
        with self._lock:
            held, tensors = self._held[key_id], self._opened(key_id)
        copied = _copy(tensors, targets, stream)
        # Afterwards: what was copied is what was verified, or it is not used.
        held.check_unchanged()
        with self._lock:
            self._trim(keep=key_id)
        return copied

    def forget(self, key_id: str) -> None:
        """Drop a replica and let the node's cache have its files."""
        with self._lock:
            self._drop(key_id)
            held = self._held.pop(key_id, None)
            if held is not None:
                held.close()

    def drop(self, key_id: str) -> None:
        """Drop a replica; its verified files bring it back at the next use."""
        with self._lock:
            self._drop(key_id)

    def resident_bytes(self) -> int:
        """Bytes of the replicas that are mapped or pinned."""
        with self._lock:
            return sum(_nbytes(tensors) for tensors, _ in self._open.values())

    def close(self) -> None:
        """Forget everything."""
        for key_id in list(self._held):
            self.forget(key_id)

    def _opened(self, key_id: str) -> Tensors:
        if key_id not in self._open:
            tensors: Tensors = mapped(self._held[key_id].folder)
            pinned = None
            if self._pinned:
                self._trim(room=_nbytes(tensors))
                pinned = _Pinned(tensors)
                tensors = pinned.tensors
            self._open[key_id] = tensors, pinned
        self._open.move_to_end(key_id)
        return self._open[key_id][0]

    def _trim(self, *, keep: str | None = None, room: int = 0) -> None:
        for key_id in list(self._open):
            if self.resident_bytes() + room <= self._limit:
                return
            if key_id != keep:
                self._drop(key_id)

    def _drop(self, key_id: str) -> None:
        _, pinned = self._open.pop(key_id, (None, None))
        if pinned is not None:
            pinned.close()


def _copy(tensors: Tensors, targets: Tensors, stream: Any) -> int:
    with torch.no_grad(), torch.cuda.stream(stream):  # without a stream this does nothing
        for name, tensor in tensors.items():
            targets[name].copy_(tensor, non_blocking=stream is not None)
    if stream is not None:
        stream.synchronize()
    return _nbytes(tensors)


def _nbytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
