"""The vLLM engine: stock vLLM behind the engine protocol, ids in and ids out.

vLLM computes in processes of its own and gets neither tokenizer nor network nor code from the
folder. It takes nothing from the folder's generation_config.json: stop ids, like every option,
go with each request.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import struct
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from anamorph.errors import BadRequest, SetupError, Unavailable
from anamorph.serve.engines import folder as files
from anamorph.serve.engines.base import Load, Sampling, Token, finish_reason
from anamorph.serve.engines.vllm import plugin
from anamorph.serve.engines.vllm.arguments import arguments, context_length, environment
from anamorph.serve.engines.vllm.watch import watch_class
from anamorph.wire.serving import EngineSettings

# Below the first a temperature is greedy, as in the torch engine; vLLM draws from the second on.
_GREEDY_BELOW = 1e-4
_COLDEST = 1e-2


def load(folder: Path, settings: EngineSettings, *, threads: int | None = None) -> VllmEngine:
    """Load a folder with stock vLLM and start computing.

    Safetensors only, no remote code, no tokenizer, no network, no usage statistics. The
    process's environment is changed: vLLM reads its settings there. On GPUs with more than
    one rank Ray's executor is used, on the CPU vLLM's own processes.

    Args:
        folder: local folder that has been verified.
        settings: of the application; sizes, ranks, devices, and the key id that salts the cache.
        threads: for arithmetic on the CPU, all ranks together; by default OpenMP decides.

    Raises:
        UnsupportedOption: the folder asks for code of its own or for a decoding rule, or the model
            cannot be split into so many ranks.
        SetupError: vLLM is not installed here, or cannot load the folder in this way.
    """
    if find_spec("vllm") is None:
        raise SetupError("the vLLM engine needs vLLM in this environment: pip install 'anamorph[vllm]'")
    plugin.check_installed()
    files.refuse_code(folder)
    files.refuse_decoding_rules(folder)
    config = files.read(folder, files.CONFIG)
    chosen = arguments(folder, config, settings)
    os.environ.update(environment(settings, threads))
    return engine_of(_start(chosen), folder, settings)


def engine_of(started: Any, folder: Path, settings: EngineSettings) -> VllmEngine:
    """A running ``AsyncLLM`` as the engine of one application: its key id salts the cache."""
    config = files.read(folder, files.CONFIG)
    return VllmEngine(
        started,
        vocab_size=int(config["vocab_size"]),
        context_length=context_length(config, settings),
        eos_ids=files.eos_ids(folder),
        salt=settings.key_id,
        # After what bounds a step of several ranks, and before the requests' own deadline.
        stall_s=settings.request_timeout_s / 2,
    )


def _start(chosen: Mapping[str, Any]) -> Any:
    # Imported here: vLLM reads its environment when it is imported.
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    try:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**chosen), stat_loggers=[watch_class()])
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise SetupError(f"vLLM cannot load this folder: {type(error).__name__}; its log says why") from error


class VllmEngine:
    """One running vLLM.

    Args:
        engine: an ``AsyncLLM`` with a ``Watch``.
        vocab_size, context_length, eos_ids: of the model.
        salt: key id; prompts share a cached prefix under the same one only. None for plaintext.
        stall_s: sequences inside and no finished step for so long mean that it hangs.
        clock: monotonic seconds, as ``Watch`` reads them.
    """

    def __init__(
        self,
        engine: Any,
        *,
        vocab_size: int,
        context_length: int,
        eos_ids: frozenset[int],
        salt: str | None,
        stall_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.eos_ids = eos_ids
        self._engine = engine
        self._watch = engine.logger_manager.stat_loggers[0]
        self._salt = salt
        self._stall_s = stall_s
        self._clock = clock
        self._numbers = itertools.count()
        self._inside = 0
        self._busy_since = clock()

    async def submit(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Token, None]:
        """Generate one sequence; closing the generator cancels it in vLLM.

        Raises:
            BadRequest: a temperature that vLLM would silently replace.
            Unavailable: as the protocol says.
        """
        _refuse(sampling)
        stops = sampling.stop_ids | (frozenset() if sampling.ignore_eos else self.eos_ids)
        if self._inside == 0:  # an idle engine makes no steps: count from now
            self._busy_since = self._clock()
        self._inside += 1
        try:
            async with (
                aclosing(self._outputs(prompt, sampling, stops)) as outputs,
                aclosing(_tokens(outputs, sampling, stops)) as tokens,
            ):
                async for token in tokens:
                    yield token
        finally:
            self._inside -= 1

    async def _outputs(
        self, prompt: Sequence[int], sampling: Sampling, stops: frozenset[int]
    ) -> AsyncGenerator[Any, None]:
        from vllm.inputs.engine import tokens_input

        ids = tokens_input(list(prompt), cache_salt=self._salt)
        number = str(next(self._numbers))
        try:
            async with aclosing(self._engine.generate(ids, _parameters(sampling, stops), number)) as outputs:
                async for output in outputs:
                    yield output
        except Exception:  # noqa: BLE001 - vLLM's text may quote the request
            raise Unavailable(
                "the engine failed on this request", code="unavailable", retry_after=5
            ) from None

    def healthy(self) -> bool:
        """VLLM's processes live, and a step ends now and then."""
        last = max(self._watch.last_step, self._busy_since)
        stalled = self._inside > 0 and self._clock() - last > self._stall_s
        return not self._engine.errored and not stalled

    def load(self) -> Load:
        """As vLLM counted after its last step; what has just come in counts as waiting."""
        running = min(self._watch.load.running, self._inside)
        return Load(running, self._inside - running)

    def close(self) -> None:
        """End vLLM's processes; what is running fails with ``Unavailable``."""
        self._engine.shutdown(timeout=10)


def _refuse(sampling: Sampling) -> None:
    if _GREEDY_BELOW <= sampling.temperature < _COLDEST:
        raise BadRequest(
            f"temperature: this engine takes 0 or at least {_COLDEST}",
            code="invalid_value",
            param="temperature",
        )


def _parameters(sampling: Sampling, stops: frozenset[int]) -> Any:
    """The request's options as vLLM calls them; what is not named here is switched off by default."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=0.0 if sampling.temperature < _GREEDY_BELOW else sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=_seed(sampling),
        # The chosen token's own is always asked for: that is where NaN shows.
        logprobs=sampling.logprobs or 0,
        logit_bias=dict(sampling.logit_bias) or None,
        stop_token_ids=sorted(stops),
        ignore_eos=True,  # those of the model are among ``stops`` already
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _seed(sampling: Sampling) -> int:
    """63 bits of seed and index; vLLM reads -1 as no seed at all."""
    packed = struct.pack("<qq", sampling.seed, sampling.index)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


async def _tokens(
    outputs: AsyncGenerator[Any, None], sampling: Sampling, stops: frozenset[int]
) -> AsyncGenerator[Token, None]:
    """One token at a time, however many vLLM hands over at once."""
    produced, finish = 0, None
    async for output in outputs:
        began = output.metrics.scheduled_ts or None
        for token, logprobs in _new(output):
            produced += 1
            finish = finish_reason(token, produced, stops, sampling.max_tokens)
            chosen, top = _logprobs(token, logprobs, sampling.logprobs)
            yield Token(token, chosen, top, finish, began if produced == 1 else None)
    if finish is None:
        raise Unavailable("the engine ended this sequence early", code="unavailable", retry_after=5)


def _new(output: Any) -> Iterable[tuple[int, Mapping[int, Any]]]:
    completion = output.outputs[0]
    return zip(completion.token_ids, completion.logprobs or (), strict=True)


def _logprobs(
    token: int, found: Mapping[int, Any], wanted: int | None
) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    chosen = found[token].logprob
    if math.isnan(chosen):
        raise Unavailable("the model computed no finite logits", code="unavailable")
    if wanted is None:
        return None, ()
    best = sorted((item for item in found.items() if item[1].rank <= wanted), key=lambda item: item[1].rank)
    return chosen, tuple((other, one.logprob) for other, one in best)
