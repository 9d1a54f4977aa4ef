"""A slot of the torch engine: a module that keeps its memory and changes its weights.

transformers' manager is used without its thread: whoever steps a slot runs the step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from transformers.generation.continuous_batching.continuous_api import OutputRouter

from anamorph.errors import MixedKeys, Unavailable
from anamorph.serve.engines.base import Token
from anamorph.serve.engines.sampler import Drawn, Sampler
from anamorph.serve.engines.torch import Capacity, delivered, manager_of
from anamorph.serve.slots.base import Delivery, Job
from anamorph.serve.slots.host import Source, new_stream


class _Outputs(OutputRouter):
    """Keeps what the manager puts out until the step is over."""

    def __init__(self) -> None:
        super().__init__()
        self._arrived: list[Any] = []

    def deliver(self, output: Any) -> None:
        self._arrived.append(output)

    def deliver_batch(self, outputs: list[Any]) -> None:
        self._arrived.extend(outputs)

    def take(self) -> list[Any]:
        taken, self._arrived = self._arrived, []
        return taken


class _Inside:
    """A sequence in a slot."""

    def __init__(self, job: Job, request_id: str) -> None:
        self.job = job
        self.request_id = request_id
        self.drawn = Drawn(job.sampling, len(job.prompt))
        self.produced = 0


class TorchSlot:
    """One module, its cache and its manager; the weights and the cache of one key at a time.

    Args:
        model: a transformers causal language model in evaluation mode.
        capacity: sizes of batch and cache.
        source: where replicas come from.
        names: of the module's tensors that a replica fills.
    """

    def __init__(self, model: Any, capacity: Capacity, source: Source, names: Sequence[str]) -> None:
        self.model = model
        self.key_id: str | None = None
        self._generation = 0
        self._source = source
        state = model.state_dict()
        self._targets = {name: state[name] for name in names}
        self._stream = new_stream(model.device)
        self._inside: dict[str, _Inside] = {}
        self._request_ids: dict[int, str] = {}
        self._sampler = Sampler(time.monotonic)
        self._outputs = _Outputs()
        self._manager = manager_of(model, capacity, self._sampler)
        self._manager.output_router = self._outputs
        self._processor = self._manager._create_batch_processor()
        model.register_forward_pre_hook(self._assert_one_key)

    def load(self, key_id: str) -> int:
        """Replace weights and forget every sequence and cached block; returns the bytes copied."""
        # Until the copy is through there is no key, and any step would fail its assertion.
        self.key_id = None
        self._generation += 1
        self._flush()
        copied = self._source.copy_into(key_id, self._targets, self._stream)
        self.key_id = key_id
        return copied

    def _flush(self) -> None:
        for inside in list(self._inside.values()):
            self._forget(inside)
        for queue in (self._manager.input_queue, self._manager.cancel_queue):
            while not queue.empty():
                queue.get_nowait()
        # Not the processor's own reset: that keeps the hashes of prefixes, and with them the blocks,
        # and fills an attention mask of the largest batch, which every step does for its own.
        self._processor.offloading_manager.reset()
        self._processor.scheduler.reset()
        self._processor.cache.reset()
        self._outputs.take()

    def add(self, job: Job) -> None:
        """Take a sequence."""
        if job.key_id != self.key_id:
            raise MixedKeys("a sequence was given to a slot with another key")
        inside = _Inside(job, f"{self._stamp()}{job.number}")
        self._inside[inside.request_id] = inside
        self._request_ids[job.number] = inside.request_id
        self._sampler.register(inside.request_id, inside.drawn)
        self._manager.add_request(
            list(job.prompt),
            request_id=inside.request_id,
            max_new_tokens=job.sampling.max_tokens,
            streaming=True,
            eos_token_id=sorted(job.stops),
        )

    def cancel(self, number: int) -> None:
        """Drop a sequence before the next step, if it is still inside."""
        inside = self._inside.get(self._request_ids.get(number, ""))
        if inside is not None:
            self._manager.cancel_request(inside.request_id)
            self._forget(inside)

    def step(self) -> list[Delivery]:
        """Compute the next token of the sequences inside."""
        if self._processor.prepare_next_batch():
            self._processor._generation_step(self.model)
            self._processor.update_batch()
        return [delivery for output in self._outputs.take() if (delivery := self._delivery(output))]

    def _stamp(self) -> str:
        # Request ids begin with it. Without a key no request can have it, as key ids have no blanks.
        return f"{self.key_id or 'no key'}#{self._generation}#"

    def _assert_one_key(self, *_: Any) -> None:
        """Before every forward pass: each of its requests came for the key whose weights are here."""
        stamp = self._stamp()
        batch = self._processor.inputs_and_outputs.requests_in_batch
        if not all(future.state.request_id.startswith(stamp) for future in batch):
            raise MixedKeys("a step held a request of another key than the slot's weights")

    def _delivery(self, output: Any) -> Delivery | None:
        inside = self._inside.get(output.request_id)
        if inside is None:  # cancelled while the step was computed
            return None
        try:
            if output.error is not None:  # its text may quote the request
                raise Unavailable("the engine failed on this request", code="unavailable", retry_after=5)
            delivery = Delivery(inside.job.number, _tokens(inside, output.generated_tokens))
        except Unavailable as error:
            self._manager.cancel_request(output.request_id)
            delivery = Delivery(inside.job.number, error=error)
        if output.is_finished() or delivery.error is not None:
            self._forget(inside)
        return delivery

    def _forget(self, inside: _Inside) -> None:
        # On the event loop's thread or on the stepping one; each line is atomic, and twice does no harm.
        self._sampler.forget(inside.request_id)
        self._inside.pop(inside.request_id, None)
        self._request_ids.pop(inside.job.number, None)


def _tokens(inside: _Inside, generated: Sequence[int]) -> tuple[Token, ...]:
    fresh = generated[inside.produced :]
    tokens = []
    for token in fresh:
        inside.produced += 1
        tokens.append(delivered(token, inside.produced, inside.drawn, inside.job.stops))
    return tuple(tokens)
