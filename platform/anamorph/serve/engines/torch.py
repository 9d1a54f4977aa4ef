"""The torch engine: transformers' continuous batching behind the engine protocol."""

from __future__ import annotations

import asyncio
import itertools
import json
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
from anamorph.serve.engines.sampler import Drawn, Sampler
from anamorph.wire.admin import Dtype

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
    """

    context_length: int
    max_batch_tokens: int = 2048
    num_blocks: int = 512
    max_concurrent: int = 16
    stall_s: float = 120


def load(folder: Path, dtype: Dtype, capacity: Capacity, *, device: str | None = None) -> TorchEngine:
    """Load a folder with stock transformers and start computing.

    Safetensors only, no remote code, no tokenizer, no network.

    Args:
        folder: local folder that has been verified.
        dtype: type that weights and arithmetic have; ``auto`` keeps the stored one.
        capacity: sizes of batch and cache.
        device: torch device; by default the first accelerator there is, else the CPU.

    Raises:
        UnsupportedOption: the folder asks for code of its own or for a decoding rule that
            would be ignored.
        SetupError: transformers cannot load it.
    """
    _refuse_code(folder)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=_DTYPES.get(dtype, "auto"),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            attn_implementation="sdpa",
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise SetupError(f"transformers cannot load this folder: {type(error).__name__}") from error
    return TorchEngine(model.eval().to(device or default_device()), capacity)


def default_device() -> str:
    """``cuda`` where there is one, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _refuse_code(folder: Path) -> None:
    for path in (folder / "config.json", folder / "generation_config.json"):
        if path.exists() and "auto_map" in json.loads(path.read_text()):
            raise UnsupportedOption(f"{path.name} names code to run (auto_map); it is refused")


class TorchEngine:
    """One model, one manager, one background thread.

    Args:
        model: a transformers causal language model in evaluation mode.
        capacity: sizes of batch and cache.
        clock: monotonic seconds.
    """

    def __init__(
        self, model: Any, capacity: Capacity, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        logging.getLogger(_MANAGER_LOG).setLevel(logging.CRITICAL + 1)
        _refuse_decoding_rules(model)
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self.context_length = min(capacity.context_length, (capacity.num_blocks - 1) * PAGE)
        self.eos_ids = _ids(model.generation_config.eos_token_id)
        self._capacity = capacity
        self._clock = clock
        self._numbers = itertools.count()
        self._inside = 0
        self._sampler = Sampler(clock)
        self._manager = _manager(model, capacity, self._sampler)
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
                    yield _delivered(token, produced, drawn, stops)
        finally:
            self._leave(request_id, finished)

    def _enqueue(
        self, request_id: str, prompt: Sequence[int], drawn: Drawn, stops: frozenset[int]
    ) -> asyncio.Queue[Any]:
        if not self._manager.is_running():
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
                if self._manager.is_running():
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
        """The manager's thread lives, recorded no fatal error, and does not hang."""
        status = self._manager.background_thread_status
        stalled = self._inside > 0 and self._clock() - self._sampler.last_step > self._capacity.stall_s
        return bool(self._manager.is_running()) and status.fatal_error is None and not stalled

    def load(self) -> Load:
        """Sequences inside; those beyond the batch's places are counted as waiting."""
        running = min(self._inside, self._capacity.max_concurrent)
        return Load(running, self._inside - running)

    def close(self) -> None:
        """Stop the thread within a step; what is running fails with ``Unavailable``."""
        self._manager.stop(block=True, timeout=30, hard_stop=True)


def _delivered(token: int, produced: int, drawn: Drawn, stops: frozenset[int]) -> Token:
    if drawn.broken:
        raise Unavailable("the model computed no finite logits", code="unavailable")
    logprob, top = drawn.logprobs.popleft() if drawn.logprobs else (None, ())
    return Token(int(token), logprob, top, finish_reason(token, produced, stops, drawn.sampling.max_tokens))


def _manager(model: Any, capacity: Capacity, sampler: Sampler) -> Any:
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
        ),
    )
    processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([sampler]))
    processors.tensors_required = 1
    manager.logit_processor = processors
    return manager


def _refuse_decoding_rules(model: Any) -> None:
    """A folder whose own configuration changes greedy decoding would not be served faithfully."""
    config = GenerationConfig.from_dict({**model.generation_config.to_dict(), "do_sample": False})
    names = [type(one).__name__ for one in model._get_logits_processor(config, input_ids_seq_length=1)]
    if names or (config.num_beams or 1) > 1:
        raise UnsupportedOption(f"generation_config.json asks for {', '.join(names) or 'beam search'}")


def _ids(value: int | Sequence[int] | None) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset([value] if isinstance(value, int) else value)
