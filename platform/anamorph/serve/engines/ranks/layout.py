"""How a model is split over ranks, and which splits are refused. Imports neither torch nor Ray."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anamorph.errors import SetupError, UnsupportedOption
from anamorph.serve.cluster.placement import ray_resources
from anamorph.wire.serving import EngineSettings

# Ranks are in step with each other to the millisecond; one that answers nothing for so long hangs.
# Long enough for a machine that is busy with other things.
COLLECTIVE_S = 15.0


@dataclass(frozen=True)
class Layout:
    """``tensor`` ranks share every layer, or ``pipeline`` stages have some layers each."""

    tensor: int = 1
    pipeline: int = 1

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline

    @classmethod
    def of(cls, settings: EngineSettings) -> Layout:
        """The layout that an application asks for."""
        return cls(settings.tensor_parallel, settings.pipeline_parallel)


def own_ranks(settings: EngineSettings) -> int:
    """Processes that we start for one replica: 1 unless the torch engine is sharded."""
    return Layout.of(settings).ranks if settings.engine == "torch" else 1


def placed_ranks(settings: EngineSettings) -> int:
    """Ranks that Ray places: ours, and vLLM's on GPUs, which Ray's executor starts in the replica's group."""
    on_gpus = settings.engine == "vllm" and settings.num_gpus > 0
    return Layout.of(settings).ranks if on_gpus else own_ranks(settings)


def bundles(settings: EngineSettings) -> list[dict[str, float]]:
    """What each rank reserves, for a Ray placement group; rank ``i`` has the ``i``-th bundle."""
    gpus = {"GPU": settings.num_gpus} if settings.num_gpus else {}
    return [{"CPU": 1.0, **gpus, **ray_resources(settings)} for _ in range(placed_ranks(settings))]


def check_layout(config: Mapping[str, Any], layout: Layout, num_gpus: float = 0) -> None:
    """Refuse what cannot be split evenly, before any process is started for it.

    Vocabulary and feed-forward width need not divide: the last rank then holds less.

    Args:
        config: ``config.json`` of the model.
        layout: that is asked for.
        num_gpus: GPUs for each rank.

    Raises:
        UnsupportedOption: the ranks do not divide a number of heads, there are more stages than layers,
            or layers are to be split both ways.
        SetupError: ranks that would share a GPU, or hold several.
    """
    if layout.ranks > 1 and num_gpus not in (0, 1):
        raise SetupError(f"num_gpus is {num_gpus:g} for each rank; with several ranks it is 0 or 1")
    if layout.tensor > 1 and layout.pipeline > 1:
        raise UnsupportedOption(
            f"tensor_parallel {layout.tensor} and pipeline_parallel {layout.pipeline} cannot be combined; "
            "set one of them to 1"
        )
    _check_heads(config, layout.tensor)
    layers = int(config["num_hidden_layers"])
    if layout.pipeline > layers:
        raise UnsupportedOption(
            f"pipeline_parallel {layout.pipeline} is more than num_hidden_layers {layers}; "
            f"this model can have 1 to {layers} stages"
        )


def _check_heads(config: Mapping[str, Any], tensor: int) -> None:
    query = int(config["num_attention_heads"])
    heads = {
        "num_attention_heads": query,
        "num_key_value_heads": int(config.get("num_key_value_heads") or query),
    }
    possible = math.gcd(*heads.values())
    for name, count in heads.items():
        if count % tensor:
            raise UnsupportedOption(
                f"tensor_parallel {tensor} does not divide {name} {count}; "
                f"this model can have {_divisors(possible)}"
            )


def _divisors(number: int) -> str:
    return " or ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def collective_s(request_timeout_s: float) -> float:
    """Longest wait of one rank for the others, in seconds; it leaves a request time to hear of it."""
    return min(COLLECTIVE_S, request_timeout_s / 3)


def cores() -> int:
    """Threads for arithmetic on the CPU of this machine, for all ranks on it together.

    Ray sets OMP_NUM_THREADS to a replica's share of logical CPUs, which says nothing of cores.
    """
    return int(os.environ.get("ANAMORPH_ENGINE_THREADS", len(os.sched_getaffinity(0))))
