"""Pipeline parallel, the part that every rank does: one forward at a time, for one sequence.

Rank 0 says what is next; a word to all ranks costs one small all-reduce, so that a rank
that hangs is noticed also while nothing is computed. Continuous batching has no
pipeline, so this is plain generation: a cache for each sequence, one sequence per step,
each computed exactly as if it were alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from transformers import DynamicCache
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer

# What rank 0 says. The others contribute zeros to a maximum, so none of these may be lost in one.
WAIT, COMPUTE, FORGET, STOP = range(4)


class Stage:
    """One rank's layers and its part of every sequence's cache.

    Args:
        model: this rank's part of a model.
        collective_s: longest wait for another rank, in seconds.
    """

    def __init__(self, model: Any, collective_s: float) -> None:
        self._model = model
        self._caches: dict[int, DynamicCache] = {}
        wait = timedelta(seconds=collective_s)
        # What is said is said on the CPU: nccl would keep a GPU busy with waiting.
        self._group = dist.new_group(backend="gloo", timeout=wait)
        # transformers sends from stage to stage without a limit, and gloo then waits as long as the
        # group was created with: ten minutes, for loading. Hence a group that was created with ours.
        model._pp_stage.pp_group = dist.new_group(timeout=wait)

    def say(self, word: int, sequence: int = 0, ids: Sequence[int] = ()) -> torch.Tensor | None:
        """Rank 0: do one thing on all ranks. Of ``COMPUTE`` the logits, (vocabulary,) float32."""
        self._agree([word, sequence, len(ids)])
        return self._do(word, sequence, torch.tensor(ids, dtype=torch.int64))

    def listen(self) -> int:
        """Another rank: wait for what rank 0 says, do it, and return the word."""
        word, sequence, length = self._agree([0, 0, 0])
        self._do(word, sequence, torch.empty(length, dtype=torch.int64))
        return word

    def _agree(self, words: list[int]) -> list[int]:
        message = torch.tensor(words, dtype=torch.int64)
        dist.all_reduce(message, op=dist.ReduceOp.MAX, group=self._group)
        return [int(word) for word in message]

    def _do(self, word: int, sequence: int, ids: torch.Tensor) -> torch.Tensor | None:
        if word == FORGET:
            self._caches.pop(sequence, None)
        if word != COMPUTE:
            return None
        dist.broadcast(ids, src=0, group=self._group)
        return self._forward(sequence, ids)

    @torch.no_grad()
    def _forward(self, sequence: int, ids: torch.Tensor) -> torch.Tensor:
        if sequence not in self._caches:
            self._caches[sequence] = _cache(self._model)
        cache = self._caches[sequence]
        begin = int(cache.get_seq_length())
        device = self._model.device
        logits: torch.Tensor = self._model(
            input_ids=ids[None].to(device),
            position_ids=torch.arange(begin, begin + len(ids), device=device)[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[0, -1].float()


def _cache(model: Any) -> DynamicCache:
    """A cache whose length is right on every stage.

    transformers asks the first layer, which only the first stage has: layers of other stages
    stand for the first own one here.
    """
    cache = DynamicCache(config=model.config)
    layers = getattr(model, model.base_model_prefix).layers
    elsewhere = [isinstance(layer, PipelineIdentityLayer) for layer in layers]
    own = cache.layers[elsewhere.index(False)]
    cache.layers = [own if away else layer for layer, away in zip(cache.layers, elsewhere, strict=True)]
    return cache


def follow(model: Any, collective_s: float) -> None:
    """Do what rank 0 says until it says stop.

    Raises:
        RuntimeError: another rank is gone, or did not answer in time.
    """
    stage = Stage(model, collective_s)
    while stage.listen() != STOP:
        pass
