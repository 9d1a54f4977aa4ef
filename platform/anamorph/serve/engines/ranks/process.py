"""One rank as a process of ``torch.distributed``: how ranks find each other, and load their own slices."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout, _world
from torch.distributed.tensor import DTensor
from transformers import DistributedConfig

from anamorph.errors import SetupError
from anamorph.serve.engines.base import Engine
from anamorph.serve.engines.ranks import stage
from anamorph.serve.engines.ranks import tensor as tensor_parallel
from anamorph.serve.engines.ranks.layout import Layout, cores
from anamorph.serve.engines.ranks.pipeline import PipelineEngine
from anamorph.serve.engines.torch import Capacity, load_model
from anamorph.wire.serving import EngineSettings

_tcp_store: Any = dist.TCPStore  # type: ignore[attr-defined]
# Ranks may come to the meeting and finish loading this far apart: their disks differ.
LOADING = timedelta(minutes=10)


@dataclass(frozen=True)
class Meeting:
    """Where ranks meet: rank 0's node, a port of it, and the only address that listens there."""

    address: str
    port: int
    ranks: int


def call_meeting(address: str, ranks: int) -> tuple[Meeting, Any]:
    """Open the place where ranks meet; it is open as long as the store is held.

    The listening socket is bound here and handed over: torch would listen on every address of the
    machine, and on a port that somebody may have taken since it was drawn.
    """
    listener = socket.create_server((address, 0))
    port = listener.getsockname()[1]
    store = _tcp_store(
        address,
        port,
        ranks,
        is_master=True,
        timeout=LOADING,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return Meeting(address, port, ranks), store


def join(meeting: Meeting, rank: int, address: str, store: Any = None) -> None:
    """Join the group of all ranks; returns once all are there.

    Args:
        meeting: where.
        rank: which one this process is.
        address: of this node; collectives listen on its interface only.
        store: rank 0's own.
    """
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, interface(address))
    # Ray shows each rank its own device only, so it is always the first.
    os.environ["LOCAL_RANK"] = "0"
    gpu = torch.cuda.is_available()
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        store=store or _tcp_store(meeting.address, meeting.port, meeting.ranks, timeout=LOADING),
        rank=rank,
        world_size=meeting.ranks,
        timeout=LOADING,
        device_id=torch.device("cuda", 0) if gpu else None,
    )


def interface(address: str) -> str:
    """Name of the network interface that has an address.

    Raises:
        SetupError: none has it.
    """
    # Linux answers on all of 127.0.0.0/8, and names only the first.
    named = "127.0.0.1" if ipaddress.ip_address(address).is_loopback else address
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == named for entry in entries):
            return str(name)
    raise SetupError(f"no network interface has this node's address {address}; set GLOO_SOCKET_IFNAME")


class Part:
    """One rank's part of a model.

    Args:
        settings: of the application.
        folder: of the verified replica on this node.
        rank: which this process is.
        share: how many ranks this node's cores are shared by.
    """

    def __init__(self, settings: EngineSettings, folder: Path, rank: int, share: int) -> None:
        self._dtype = settings.dtype
        self._layout = Layout.of(settings)
        self._capacity = Capacity.of(settings)
        self._folder = folder
        self._rank = rank
        self._threads = max(1, cores() // share)

    def load(self, meeting: Meeting, address: str, store: Any = None) -> None:
        """Join the others and load this rank's slices; no collective waits long from then on.

        Args:
            meeting: where.
            address: of this node.
            store: rank 0's own.

        Raises:
            UnsupportedOption, SetupError: as ``engines.torch.load_model``.
        """
        torch.set_num_threads(self._threads)
        join(meeting, self._rank, address, store)
        split = DistributedConfig(tp_size=self._layout.tensor, pp_size=self._layout.pipeline)
        self.model = load_model(self._folder, self._dtype, distributed_config=split).eval()
        own_memory(self.model)
        dist.barrier()
        for group in list(_world.pg_map):
            _set_pg_timeout(timedelta(seconds=self._capacity.collective_s), group)

    def lead(self, alive: Callable[[], bool]) -> Engine:
        """Rank 0: the engine; ``alive`` says whether the other ranks live."""
        if self._layout.pipeline > 1:
            return PipelineEngine(self.model, self._capacity, alive)
        return tensor_parallel.lead(self.model, self._capacity, alive)

    def follow(self) -> None:
        """Any other rank: take part until rank 0 stops.

        Raises:
            RuntimeError: another rank is gone or hangs.
        """
        if self._layout.pipeline > 1:
            stage.follow(self.model, self._capacity.collective_s)
        else:
            tensor_parallel.follow(self.model, self._capacity)


@torch.no_grad()
def own_memory(model: Any) -> None:
    """Copy weights out of the mapped files, so that their mapping ends.

    A slice of a file is a view of its whole tensor, and reading one column touches every page:
    mapped, most of what belongs to other ranks would stay resident here.
    """
    copies: dict[int, torch.Tensor] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        local = _local(tensor)
        if local.device.type == "cpu":
            local.data = copies.setdefault(local.data_ptr(), local.clone())


def resident_bytes(model: Any) -> int:
    """Bytes of memory behind the weights and buffers of this process, shared ones once."""
    held = (_local(tensor).untyped_storage() for tensor in chain(model.parameters(), model.buffers()))
    return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


def _local(tensor: torch.Tensor) -> torch.Tensor:
    # Not ``to_local``: that is another view, and what is set there changes nothing here.
    local: torch.Tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local
