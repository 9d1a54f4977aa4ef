"""The slots of the torch engine, made of the first member and filled from host memory or files."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

from anamorph.errors import SetupError
from anamorph.replica import Held
from anamorph.serve.engines import folder as configuration
from anamorph.serve.engines.torch import PAGE, Capacity, default_device, load_model
from anamorph.serve.slots.base import Opened
from anamorph.serve.slots.files import Files
from anamorph.serve.slots.host import HostMemory, PageCache, Source
from anamorph.serve.slots.shape import Shape
from anamorph.serve.slots.slot import TorchSlot
from anamorph.wire.serving import PoolMember, PoolSettings


class TorchBackend:
    """Slots of one shape, made when the first member is opened.

    Args:
        settings: of the pool.
        capacity: of each slot.
        hold: verifies a member's replica and keeps its folder.
        device: torch device; by default the first accelerator there is, else the CPU.
    """

    def __init__(
        self,
        settings: PoolSettings,
        capacity: Capacity,
        hold: Callable[[PoolMember], Held],
        *,
        device: str | None = None,
    ) -> None:
        self._settings = settings
        self._capacity = capacity
        self._hold = hold
        self._device = device or default_device()
        on_cpu = self._device == "cpu"
        self._source: Source = PageCache() if on_cpu else HostMemory(settings.host_bytes, pinned=True)
        self._shape: Shape | None = None
        self._slots: list[TorchSlot] = []
        self._lock = threading.Lock()

    def open(self, member: PoolMember) -> Opened:
        """Verify a member's replica; the first one decides the shapes that all others must have."""
        held = self._hold(member)
        try:
            configuration.refuse_code(held.folder)
            configuration.refuse_decoding_rules(held.folder)
            with self._lock:
                vocab_size = self._fit(held)
        except BaseException:
            held.close()
            raise
        self._source.add(member.key_id, held)
        length = min(self._capacity.context_length, (self._capacity.num_blocks - 1) * PAGE)
        return Opened(vocab_size, length, configuration.eos_ids(held.folder))

    def _fit(self, held: Held) -> int:
        shape = Shape.of(held.folder)
        if self._shape is None:
            self._make_slots(held)
            self._shape = shape
        self._shape.check(shape)
        return int(self._slots[0].model.config.get_text_config().vocab_size)

    def _make_slots(self, held: Held) -> None:
        model = load_model(held.folder, self._settings.dtype).eval().to(self._device)
        with Files(held.folder) as files:
            stored = files.empty()
            files.read_into(stored)
        targets = _targets(model, stored)
        held.check_unchanged()
        models = [model, *(copy.deepcopy(model) for _ in range(1, self._settings.slots))]
        self._slots = [TorchSlot(one, self._capacity, self._source, tuple(targets)) for one in models]

    def slot(self, index: int) -> TorchSlot:
        """The slots are of one kind; which one holds what is the scheduler's to say."""
        return self._slots[index]

    def forget(self, key_id: str) -> None:
        """Free what is kept of a member."""
        self._source.forget(key_id)

    def drop(self, key_id: str) -> None:
        """Keep no copy of a member's replica; its files bring it back."""
        self._source.drop(key_id)

    def resident_bytes(self) -> int:
        """Bytes of replicas in host memory, beyond the slots."""
        return self._source.resident_bytes()

    def close(self) -> None:
        """Forget all replicas."""
        self._source.close()


def _targets(model: Any, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The module's tensors that a replica's fill, by the replica's names.

    Compared with what transformers made of the same files: an architecture whose tensors are
    renamed, fused or converted while it is loaded cannot be swapped by name, and is refused.

    Raises:
        SetupError: names the tensor.
    """
    state = model.state_dict()
    for name, tensor in stored.items():
        if name not in state or not _same(state[name], tensor):
            raise SetupError(
                f"'{name}' is stored otherwise than it is computed with: use placement dedicated"
            )
    filled = {state[name].data_ptr() for name in stored}
    left = [name for name, tensor in state.items() if tensor.data_ptr() not in filled]
    if left:
        raise SetupError(f"'{left[0]}' stands in no file of the replica: use placement dedicated")
    return {name: state[name] for name in stored}


def _same(computed: torch.Tensor, stored: torch.Tensor) -> bool:
    return computed.shape == stored.shape and torch.equal(computed.cpu(), stored.to(computed.dtype))
