"""What slots are filled from: pinned copies in host memory for a GPU, the files themselves for a CPU."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any, Protocol

import torch

from anamorph.errors import SetupError
from anamorph.replica import Held
from anamorph.serve.slots.files import Files, Tensors


class Source(Protocol):
    """Verified replicas by key id.

    Copying, forgetting and closing are one thread's; the others may add and ask.
    """

    def add(self, key_id: str, held: Held) -> None:
        """Know a verified replica; it is held until ``forget``."""
        ...

    def copy_into(self, key_id: str, targets: Tensors, stream: Any = None) -> int:
        """Copy a replica into tensors of the same names and shapes; returns the bytes read.

        Raises:
            ReplicaRefused: its files changed since they were verified; the targets hold rubbish.
            SetupError: they cannot be read.
        """
        ...

    def forget(self, key_id: str) -> None:
        """Let the node's cache have a replica's files."""
        ...

    def drop(self, key_id: str) -> None:
        """Keep no copy of a replica; its verified files bring it back at the next use."""
        ...

    def resident_bytes(self) -> int:
        """Bytes of the copies that this process keeps."""
        ...

    def close(self) -> None:
        """Forget everything."""
        ...


class _Members:
    """Replicas that are held, by key id."""

    def __init__(self) -> None:
        self._held: dict[str, Held] = {}
        self._lock = threading.RLock()

    def add(self, key_id: str, held: Held) -> None:
        with self._lock:
            self._held[key_id] = held

    def forget(self, key_id: str) -> None:
        with self._lock:
            self.drop(key_id)
            held = self._held.pop(key_id, None)
            if held is not None:
                held.close()

    def drop(self, key_id: str) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        for key_id in list(self._held):
            self.forget(key_id)


class PageCache(_Members):
    """For slots on a CPU: the kernel keeps files in memory as long as it can; a copy would be one more."""

    def copy_into(self, key_id: str, targets: Tensors, stream: Any = None) -> int:  # noqa: ARG002 -- of a GPU
        with self._lock:
            held = self._held[key_id]
        with Files(held.folder) as files:
            copied = files.read_into(targets)
        # Afterwards: what was copied is what was verified, or it is not used.
        held.check_unchanged()
        return copied

    def resident_bytes(self) -> int:
        return 0


class HostMemory(_Members):
    """For slots on a GPU: copies in host memory.

    Beyond ``limit`` bytes the least recently used ones are dropped, but not the one in use, so the bound
    is ``limit`` or one replica, whichever is more.

    Args:
        limit: bytes.
        pinned: page-locked memory, which a GPU reads at the rate of its bus; where there is none, ordinary.
    """

    def __init__(self, limit: int, *, pinned: bool) -> None:
        super().__init__()
        self._limit = limit
        self._pinned = pinned
        self._copies: OrderedDict[str, _Copy] = OrderedDict()

    def copy_into(self, key_id: str, targets: Tensors, stream: Any = None) -> int:
        with self._lock:
            held, copy = self._held[key_id], self._copy_of(key_id)
        with torch.no_grad(), torch.cuda.stream(stream):  # without a stream this does nothing
            for name, tensor in copy.tensors.items():
                targets[name].copy_(tensor, non_blocking=stream is not None)
        if stream is not None:
            stream.synchronize()
        held.check_unchanged()
        return copy.nbytes

    def drop(self, key_id: str) -> None:
        with self._lock:
            copy = self._copies.pop(key_id, None)
        if copy is not None:
            copy.close()

    def resident_bytes(self) -> int:
        with self._lock:
            return sum(copy.nbytes for copy in self._copies.values())

    def _copy_of(self, key_id: str) -> _Copy:
        if key_id not in self._copies:
            with Files(self._held[key_id].folder) as files:
                self._make_room(files.nbytes)
                self._copies[key_id] = _Copy(files, pinned=self._pinned)
        self._copies.move_to_end(key_id)
        return self._copies[key_id]

    def _make_room(self, wanted: int) -> None:
        for key_id in list(self._copies):
            if self.resident_bytes() + wanted <= self._limit:
                return
            self.drop(key_id)


class _Copy:
    """A replica in host memory.

    Pinned by hand: torch's own pinned allocator rounds up to a power of two.
    """

    def __init__(self, files: Files, *, pinned: bool) -> None:
        self.tensors = files.empty()
        self.nbytes = files.read_into(self.tensors)
        self._registered: list[int] = []
        if pinned:
            for tensor in self.tensors.values():
                _check(_cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))
                self._registered.append(tensor.data_ptr())

    def close(self) -> None:
        for place in self._registered:
            _check(_cudart().cudaHostUnregister(place))
        self._registered, self.tensors = [], {}


def new_stream(device: torch.device) -> Any:
    """A stream for copies beside a GPU's computing; None on a CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _check(status: Any) -> None:
    if int(status) != 0:
        raise SetupError(f"CUDA cannot pin host memory (error {int(status)}); lower host_bytes")
