"""The one logits processor of the torch engine: every per-request option lives here.

The manager batches many requests, knows few options per request and takes the arg
max of whatever scores come back. So the sampler chooses each row's token itself and
returns scores whose arg max is that token. A row depends on its own logits and
options only: noise comes from a counter (seed, sequence, position), never from a
generator whose state the neighbours would move.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
)

from anamorph.serve.engines.base import Sampling

# Below this a temperature would only overflow; it is greedy already.
GREEDY_BELOW = 1e-4
Logprobs = tuple[float, tuple[tuple[int, float], ...]]


@dataclass
class Drawn:
    """One sequence as the sampler knows it; the generation thread writes, the event loop reads."""

    sampling: Sampling
    prompt_length: int
    logprobs: deque[Logprobs] = field(default_factory=deque)
    broken: bool = False
    began: float | None = None  # when the manager took it out of its queue, ``time.perf_counter``

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature < GREEDY_BELOW


@dataclass(frozen=True)
class Row:
    """One sequence in one step."""

    drawn: Drawn
    position: int  # tokens generated before this one


class Sampler(ContinuousBatchingLogitsProcessor):
    """Chooses the next token of every row of a batch.

    Args:
        clock: monotonic seconds; ``last_step`` is read from it at every step.
    """

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012 - the base class declares it so
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._drawn: dict[str, Drawn] = {}
        self._rows: list[Row | None] = []
        self.last_step = clock()

    def register(self, request_id: str, drawn: Drawn) -> None:
        """Make a sequence known before it is given to the manager."""
        with self._lock:
            self._drawn[request_id] = drawn

    def forget(self, request_id: str) -> None:
        """Drop a sequence that is finished or cancelled."""
        with self._lock:
            self._drawn.pop(request_id, None)

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """The manager's argument row is not used: options stay in ``Drawn``."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> torch.Tensor:
        """Note which request each row of the next call belongs to.

        The manager calls this right before the step, on the same thread (its
        asynchronous mode and CUDA graphs are switched off).
        """
        with self._lock:
            self._rows = [self._row(request.state) for request in requests_with_new_token]
        return torch.zeros(len(self._rows), dtype=torch.int32)

    def _row(self, state: Any) -> Row | None:
        drawn = self._drawn.get(state.request_id)
        if drawn is None:  # cancelled a moment ago; its token goes nowhere
            return None
        if drawn.began is None:
            drawn.began = state.lifespan[0]
        # A request that was pushed out of the cache comes back with its tokens in the prompt.
        total = len(state.initial_tokens) + len(state.generated_tokens)
        return Row(drawn, total - drawn.prompt_length)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Return one-hot scores of the chosen tokens; ``scores``: (rows, vocabulary) float32."""
        self.last_step = self._clock()
        rows, self._rows = self._rows, []
        # Requests still in the middle of their prompt come last, as rows without meaning.
        spare = scores.shape[0] - len(rows)
        if spare < 0:
            raise RuntimeError("the batch has fewer rows than were announced")
        chosen = self.choose(scores, [*rows, *[None] * spare])
        return torch.zeros_like(scores).scatter_(1, chosen[:, None], 1.0)

    def choose(self, scores: torch.Tensor, rows: Sequence[Row | None]) -> torch.Tensor:
        """The next token of every row, (rows,) int64."""
        return choose(scores, rows)


def choose(scores: torch.Tensor, rows: Sequence[Row | None]) -> torch.Tensor:
    """The next token of every row, (rows,) int64; records log-probabilities on the way."""
    _mark_broken(scores, rows)
    biased = _with_bias(scores, rows)
    chosen = biased.argmax(-1)
    drawing = [i for i, row in enumerate(rows) if row and not row.drawn.greedy and not row.drawn.broken]
    if drawing:
        at = torch.tensor(drawing, device=scores.device)
        chosen[at] = _draw(biased[at], [row for i in drawing if (row := rows[i])])
    _record_logprobs(scores, chosen, rows)
    return chosen


def _mark_broken(scores: torch.Tensor, rows: Sequence[Row | None]) -> None:
    finite = torch.isfinite(scores.amax(-1)).tolist()  # NaN wins a maximum, so one test finds it
    for row, good in zip(rows, finite, strict=True):
        if row and not good:
            row.drawn.broken = True


def _with_bias(scores: torch.Tensor, rows: Sequence[Row | None]) -> torch.Tensor:
    if not any(row and row.drawn.sampling.logit_bias for row in rows):
        return scores
    biased = scores.clone()
    for i, row in enumerate(rows):
        if row and (bias := row.drawn.sampling.logit_bias):
            ids = torch.tensor(list(bias), device=scores.device)
            biased[i, ids] += torch.tensor(list(bias.values()), dtype=scores.dtype, device=scores.device)
    return biased


def _draw(scores: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """Gumbel-max: the arg max of logits plus noise is a draw from their softmax. (rows,) int64."""
    options = [row.drawn.sampling for row in rows]
    temperature = torch.tensor([o.temperature for o in options], device=scores.device)
    scores = scores / temperature[:, None]
    if any(o.top_k or o.top_p < 1 for o in options):
        scores = scores.masked_fill(~_kept(scores, options), -torch.inf)
    seeds = [_row_seed(row) for row in rows]
    return (scores.double() + gumbel(seeds, scores.shape[1], scores.device)).argmax(-1)


def _kept(scores: torch.Tensor, options: Sequence[Sampling]) -> torch.Tensor:
    """Which tokens top-k and then top-p leave, (rows, vocabulary) bool; never none."""
    vocabulary = scores.shape[1]
    k = torch.tensor([min(o.top_k or vocabulary, vocabulary) for o in options], device=scores.device)
    p = torch.tensor([o.top_p for o in options], device=scores.device)
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocabulary, device=scores.device)
    within_k = rank[None, :] < k[:, None]
    share = ordered.masked_fill(~within_k, -torch.inf).softmax(-1)
    # What lies before a token decides, so the most likely one always stays.
    within_p = (share.cumsum(-1) - share < p[:, None]) | (p[:, None] >= 1)
    within_p[:, 0] = True
    return torch.zeros_like(within_k).scatter_(1, order, within_k & within_p)


def _row_seed(row: Row) -> int:
    sampling = row.drawn.sampling
    packed = struct.pack("<qqq", sampling.seed, sampling.index, row.position)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little", signed=True)


def gumbel(seeds: Sequence[int], size: int, device: torch.device) -> torch.Tensor:
    """Standard Gumbel noise (rows, size) float64, a function of each row's 64-bit seed alone.

    SplitMix64 (Steele, Lea, Flood 2014) over the counter ``seed + (i + 1)·γ``: plain
    integer arithmetic, the same on every device.
    """
    start = torch.tensor(seeds, dtype=torch.int64, device=device)[:, None]
    counter = torch.arange(1, size + 1, dtype=torch.int64, device=device)[None, :]
    z = start + counter * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _shifted(z, 31)
    uniform = (_shifted(z, 12).double() + 0.5) * 2.0**-52  # inside (0, 1), both ends excluded
    return -torch.log(-torch.log(uniform))


def _signed(value: int) -> int:
    return value - 2**64


def _shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
    # torch shifts signed numbers arithmetically; the mask makes it a logical shift.
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _record_logprobs(scores: torch.Tensor, chosen: torch.Tensor, rows: Sequence[Row | None]) -> None:
    for i, row in enumerate(rows):
        if row is None or (wanted := row.drawn.sampling.logprobs) is None:
            continue
        logs = torch.log_softmax(scores[i], -1)
        top = torch.topk(logs, min(wanted, logs.shape[0]))
        pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        row.drawn.logprobs.append((float(logs[chosen[i]]), pairs))
