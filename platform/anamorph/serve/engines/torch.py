"""The torch engine: transformers' continuous batching behind the engine protocol."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.utils import logging as transformers_logging

from anamorph.errors import SetupError, Unavailable, UnsupportedOption
from anamorph.serve.engines.base import Load, Sampling, Token, finish_reason
from anamorph.serve.engines.folder import refuse_code
from anamorph.serve.engines.ranks.layout import collective_s
from anamorph.serve.engines.sampler import Drawn, Sampler
from anamorph.wire.admin import Dtype
from anamorph.wire.serving import EngineSettings, PoolSettings

PAGE = 32  # tokens per block of the cache
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The manager's own log quotes ids of requests it drops; nothing of it may reach a file.
_MANAGER_LOG = "ContinuousBatchingLogger"


@dataclass(frozen=True)
class Capacity:
    """How much one engine holds at a time.

    Args:
        context_length: most tokens of prompt and answer together.
        max_batch_tokens: tokens computed per step; a longer prompt takes several.
        num_blocks: blocks of ``PAGE`` tokens in the key-value cache.
        max_concurrent: sequences per step.
        stall_s: sequences in the engine and no finished step for so long mean that it hangs.
        collective_s: longest wait of one rank for the others, where there are several.
    """

    context_length: int
    max_batch_tokens: int = 2048
    num_blocks: int = 512
    max_concurrent: int = 16
    stall_s: float = 120
    collective_s: float = 15

    @classmethod
    def of(cls, settings: EngineSettings | PoolSettings) -> Capacity:
        """What an application asks for; of a pool, what each slot holds."""
        return cls(
            context_length=settings.context_length,
            max_batch_tokens=settings.max_batch_tokens,
            num_blocks=settings.num_blocks,
            max_concurrent=settings.max_concurrent,
            collective_s=collective_s(settings.request_timeout_s),
        )


def load(folder: Path, dtype: Dtype, capacity: Capacity, *, device: str | None = None) -> TorchEngine:
    """Load a folder with stock transformers and start computing.

    Args:
        folder: local folder that has been verified.
        dtype: type that weights and arithmetic have; ``auto`` keeps the stored one.
        capacity: sizes of batch and cache.
        device: torch device; by default the first accelerator there is, else the CPU.

    Raises:
        UnsupportedOption, SetupError: as ``load_model``, or a decoding rule would be ignored.
    """
    return TorchEngine(load_model(folder, dtype).eval().to(device or default_device()), capacity)


def load_model(folder: Path, dtype: Dtype, **options: Any) -> Any:
    """Load a model: safetensors only, no remote code, no tokenizer, no network.

    Args:
        folder: local folder that has been verified.
        dtype: type that weights and arithmetic have; ``auto`` keeps the stored one.
        options: further arguments of ``from_pretrained``.

    Raises:
        UnsupportedOption: the folder asks for code of its own.
        SetupError: transformers cannot load it.
    """
    refuse_code(folder)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=_DTYPES.get(dtype, "auto"),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            attn_implementation="sdpa",
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise SetupError(f"transformers cannot load this folder: {type(error).__name__}") from error


def default_device() -> str:
    """``cuda`` where there is one, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class TorchEngine:
    """One model, one manager, one background thread.

    Args:
        model: a transformers causal language model in evaluation mode.
        capacity: sizes of batch and cache.
        clock: monotonic seconds.
        sampler: chooses the tokens; one with the same clock by default.
        alive: whether the other ranks live, where there are any.
    """

    def __init__(
        self,
        model: Any,
        capacity: Capacity,
        *,
        clock: Callable[[], float] = time.monotonic,
        sampler: Sampler | None = None,
        alive: Callable[[], bool] = lambda: True,
    ) -> None:
        refuse_decoding_rules(model)
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self.context_length = min(capacity.context_length, (capacity.num_blocks - 1) * PAGE)
        self.eos_ids = ids_of(model.generation_config.eos_token_id)
        self._capacity = capacity
        self._clock = clock
        self._numbers = itertools.count()
        self._inside = 0
        self._alive = alive
        self._sampler = sampler or Sampler(clock)
        self._manager = manager_of(model, capacity, self._sampler)
        self._manager.start()

    async def submit(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Token, None]:
        """Generate one sequence; closing the generator cancels it in the manager."""
        request_id = str(next(self._numbers))
        drawn = Drawn(sampling, len(prompt))
        stops = sampling.stop_ids | (frozenset() if sampling.ignore_eos else self.eos_ids)
        outputs = self._enqueue(request_id, prompt, drawn, stops)
        produced, finished = 0, False
        try:
            while not finished:
                output = await self._next(outputs)
                finished = output.is_finished()
                for token in output.generated_tokens[produced:]:
                    produced += 1
                    yield delivered(token, produced, drawn, stops)
        finally:
            self._leave(request_id, finished)

    def _enqueue(
        self, request_id: str, prompt: Sequence[int], drawn: Drawn, stops: frozenset[int]
    ) -> asyncio.Queue[Any]:
        if not self._computing():
            raise Unavailable("the engine has stopped", code="unavailable", retry_after=5)
        if self._inside == 0:  # an idle engine makes no steps: count from now
            self._sampler.last_step = self._clock()
        outputs: asyncio.Queue[Any] = asyncio.Queue()
        self._inside += 1
        self._sampler.register(request_id, drawn)
        self._manager.register_result_handler(request_id, outputs.put_nowait)
        self._manager.add_request(
            list(prompt),
            request_id=request_id,
            max_new_tokens=drawn.sampling.max_tokens,
            streaming=True,
            eos_token_id=sorted(stops),
        )
        return outputs

    async def _next(self, outputs: asyncio.Queue[Any]) -> Any:
        while True:
            try:
                async with asyncio.timeout(2):
                    output = await outputs.get()
            except TimeoutError:
                if self._computing():
                    continue
                raise Unavailable("the engine has stopped", code="unavailable", retry_after=5) from None
            if output.error is not None:  # its text may quote the request
                raise Unavailable("the engine failed on this request", code="unavailable", retry_after=5)
            return output

    def _leave(self, request_id: str, finished: bool) -> None:
        self._inside -= 1
        if not finished:
            self._manager.cancel_request(request_id)
        self._manager.output_router.result_handlers.pop(request_id, None)
        self._sampler.forget(request_id)

    def healthy(self) -> bool:
        """The manager's thread lives, recorded no fatal error, does not hang, and no rank is lost."""
        stalled = self._inside > 0 and self._clock() - self._sampler.last_step > self._capacity.stall_s
        return self._computing() and not stalled

    def _computing(self) -> bool:
        # It ceases to take requests first, and fails what runs and ends its thread after that.
        ending = self._manager.background_thread_status.can_accept_new_requests() is not None
        return bool(self._manager.is_running()) and not ending and self._alive()

    def load(self) -> Load:
        """Sequences inside; those beyond the batch's places are counted as waiting."""
        running = min(self._inside, self._capacity.max_concurrent)
        return Load(running, self._inside - running)

    def close(self) -> None:
        """Stop the thread within a step; what is running fails with ``Unavailable``."""
        self._manager.stop(block=True, timeout=30, hard_stop=True)


def delivered(token: int, produced: int, drawn: Drawn, stops: frozenset[int]) -> Token:
    """The ``produced``-th token of a sequence, with what the sampler noted of it.

    Raises:
        Unavailable: the model computed no finite logits for it.
    """
    if drawn.broken:
        raise Unavailable("the model computed no finite logits", code="unavailable")
    logprob, top = drawn.logprobs.popleft() if drawn.logprobs else (None, ())
    finish = finish_reason(token, produced, stops, drawn.sampling.max_tokens)
    return Token(int(token), logprob, top, finish, drawn.began if produced == 1 else None)


def manager_of(model: Any, capacity: Capacity, sampler: Sampler) -> Any:
    """The manager of a model, not yet started; every rank has one of the same sizes."""
    logging.getLogger(_MANAGER_LOG).setLevel(logging.CRITICAL + 1)
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig.from_dict(
            {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=capacity.num_blocks,
            max_batch_tokens=capacity.max_batch_tokens,
            max_requests_per_batch=capacity.max_concurrent,
            # Both would run the sampler ahead of the step it belongs to.
            use_async_batching=False,
            use_cuda_graph=False,
            # Never fetch attention kernels from the network.
            auto_switch_to_flash=False,
            cpu_group_timeout=capacity.collective_s,
        ),
    )
    processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([sampler]))
    processors.tensors_required = 1
    manager.logit_processor = processors
    return manager


def refuse_decoding_rules(model: Any) -> None:
    """Refuse a folder whose own configuration changes greedy decoding: it would not be served faithfully.

    Raises:
        UnsupportedOption: it does; the message names the rules.
    """
    config = GenerationConfig.from_dict({**model.generation_config.to_dict(), "do_sample": False})
    names = [type(one).__name__ for one in model._get_logits_processor(config, input_ids_seq_length=1)]
    if names or (config.num_beams or 1) > 1:
        raise UnsupportedOption(f"generation_config.json asks for {', '.join(names) or 'beam search'}")


def ids_of(value: int | Sequence[int] | None) -> frozenset[int]:
    """End-of-text ids as a set: configurations hold none, one or a list."""
    if value is None:
        return frozenset()
    return frozenset([value] if isinstance(value, int) else value)
