"""The torch engine against stock transformers: same tokens, whatever else is in the batch."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from anamorph.errors import SetupError, Unavailable, UnsupportedOption
from anamorph.serve.engines.base import Load, Sampling, Token
from anamorph.serve.engines.torch import PAGE, Capacity, TorchEngine, load

VOCAB = 160
SMALL = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
SPECIAL = {"eos_token_id": 3, "bos_token_id": 1, "pad_token_id": 0}


def tiny(model: Any = LlamaForCausalLM, config: Any = LlamaConfig, **changes: Any) -> Any:
    """A model whose logits are far from flat, so that greedy tokens mean something."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return model(config(**{**SMALL, **HEADS, **SPECIAL, "initializer_range": 0.5, **changes})).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()


SIZES = {"context_length": 400, "max_batch_tokens": 64, "num_blocks": 64, "max_concurrent": 8}
Start = Callable[..., TorchEngine]


@pytest.fixture(scope="module")
def engine(model: Any) -> Iterator[TorchEngine]:
    """One engine for all tests that leave it as they found it."""
    started = TorchEngine(model, Capacity(**SIZES))
    yield started
    started.close()


@pytest.fixture
def start(model: Any) -> Iterator[Start]:
    engines: list[TorchEngine] = []

    def build(served: Any = None, **capacity: Any) -> TorchEngine:
        engines.append(TorchEngine(served or model, Capacity(**{**SIZES, **capacity})))
        return engines[-1]

    yield build
    for one in engines:
        one.close()


def prompt_of(length: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(i) for i in torch.randint(5, VOCAB, (length,), generator=generator)]


def stock(model: Any, prompt: list[int], n: int, **options: Any) -> list[int]:
    out = model.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False, **options)
    return [int(i) for i in out[0, len(prompt) :]]


async def run(engine: TorchEngine, prompt: list[int], n: int = 12, **options: Any) -> list[Token]:
    sampling = Sampling(max_tokens=n, **{"temperature": 0.0, **options})
    async with aclosing(engine.submit(prompt, sampling)) as tokens:
        return [token async for token in tokens]


def ids(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens]


async def test_greedy_is_stock_generate_in_one_batch(model: Any, engine: TorchEngine) -> None:
    """Prompts of all lengths at once, longer than a step and longer than a page: the stock tokens each."""
    prompts = [prompt_of(n, seed=n) for n in (1, 2, 31, 32, 33, 64, 65, 150)]
    answers = await asyncio.gather(*(run(engine, p, 40) for p in prompts))
    assert [ids(a) for a in answers] == [stock(model, p, 40) for p in prompts]


async def test_greedy_with_sliding_windows(start: Start) -> None:
    """Mistral's window is kept, also across pages and split prompts."""
    mistral = tiny(MistralForCausalLM, MistralConfig, sliding_window=24)
    engine = start(mistral)
    prompts = [prompt_of(n, seed=n) for n in (3, 30, 100)]
    answers = await asyncio.gather(*(run(engine, p, 40) for p in prompts))
    assert [ids(a) for a in answers] == [stock(mistral, p, 40) for p in prompts]


async def test_shared_prefixes_change_nothing(model: Any, engine: TorchEngine) -> None:
    """Blocks of a prefix that was seen before are reused; the tokens are the same."""
    common = prompt_of(3 * PAGE)
    prompts = [common, [*common, 9], common[: 2 * PAGE], [*common, 9]]
    for prompt in prompts:
        assert ids(await run(engine, prompt)) == stock(model, prompt, 12)
    answers = await asyncio.gather(*(run(engine, p) for p in prompts))
    assert [ids(a) for a in answers] == [stock(model, p, 12) for p in prompts]


async def test_a_full_cache_delays_but_does_not_change(model: Any, start: Start) -> None:
    """Sequences that are pushed out of the cache come back and go on where they were."""
    engine = start(num_blocks=10, context_length=300)
    prompts = [prompt_of(60, seed=n) for n in range(6)]
    answers = await asyncio.gather(*(run(engine, p, 80, ignore_eos=True, logprobs=0) for p in prompts))
    assert [ids(a) for a in answers] == [stock(model, p, 80, eos_token_id=-1) for p in prompts]
    assert all(token.logprob is not None for answer in answers for token in answer)


async def test_a_seed_means_the_same_whatever_runs_beside_it(engine: TorchEngine) -> None:
    """Noise comes from seed, sequence and position: neighbours, order and time do not matter."""
    options: dict[str, Any] = {"temperature": 1.3, "seed": 42, "top_p": 0.9, "top_k": 50}
    alone = ids(await run(engine, prompt_of(20), 30, **options))
    neighbours = [run(engine, prompt_of(9 + n, n), 25, temperature=1.0, seed=n) for n in range(6)]
    together = (await asyncio.gather(*neighbours, run(engine, prompt_of(20), 30, **options)))[-1]
    assert ids(together) == alone
    assert ids(await run(engine, prompt_of(20), 30, **{**options, "seed": 43})) != alone
    assert ids(await run(engine, prompt_of(20), 30, **options, index=1)) != alone


async def test_narrow_sampling_is_greedy(engine: TorchEngine) -> None:
    """One token left by top-k, top-p or a temperature near zero is the most likely one."""
    greedy = ids(await run(engine, prompt_of(10)))
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-9}, {"temperature": 1e-3}):
        options: dict[str, Any] = {"temperature": 2.0, "seed": 5, **narrow}
        assert ids(await run(engine, prompt_of(10), **options)) == greedy


async def test_bias_moves_tokens(engine: TorchEngine) -> None:
    """+100 makes a token certain, greedy or not; the reported log-probabilities stay the model's own."""
    for temperature in (0.0, 1.0):
        answer = await run(
            engine, prompt_of(10), 4, temperature=temperature, logit_bias={77: 100.0}, logprobs=0
        )
        assert ids(answer) == [77] * 4
        assert answer[0].logprob is not None
        assert answer[0].logprob < -1
    first = ids(await run(engine, prompt_of(10), 1))[0]
    assert ids(await run(engine, prompt_of(10), 1, logit_bias={first: -100.0})) != [first]


async def test_logprobs_are_the_models_own(model: Any, engine: TorchEngine) -> None:
    """Chosen and most likely tokens with the log-softmax of the raw logits, whatever was done to them."""
    prompt = prompt_of(10)
    (token,) = await run(engine, prompt, 1, temperature=1.7, seed=3, top_k=9, logprobs=4)
    with torch.no_grad():
        truth = torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1].float(), -1)
    values, likely = torch.topk(truth, 4)
    assert token.logprob == pytest.approx(float(truth[token.id]), abs=1e-4)
    assert [i for i, _ in token.top] == likely.tolist()
    assert [v for _, v in token.top] == pytest.approx(values.tolist(), abs=1e-4)


async def test_ends_of_sequences(engine: TorchEngine) -> None:
    """End-of-text, stop ids and length; ``ignore_eos`` leaves the stop ids in force."""
    free = ids(await run(engine, prompt_of(10), 20, ignore_eos=True))
    stop = free[7]
    cut = free[: free.index(stop) + 1]
    stopped = await run(engine, prompt_of(10), 20, stop_ids=frozenset({stop}), ignore_eos=True)
    assert (ids(stopped), stopped[-1].finish) == (cut, "stop")
    assert [t.finish for t in stopped[:-1]] == [None] * (len(cut) - 1)
    assert (await run(engine, prompt_of(10), 3, ignore_eos=True))[-1].finish == "length"


async def test_the_configs_end_of_text_ids_stop(model: Any, start: Start) -> None:
    """All of a list in generation_config.json, without being asked."""
    free = stock(model, prompt_of(10), 20, eos_token_id=-1)
    other = tiny()
    other.generation_config.eos_token_id = [3, free[5]]
    answer = await run(start(other), prompt_of(10), 20)
    assert answer[-1].finish == "stop"
    assert ids(answer) == free[: free.index(free[5]) + 1]


async def test_a_closed_generator_frees_its_place(model: Any, start: Start) -> None:
    """Cancelled sequences leave the engine; the next ones are answered as ever."""
    engine = start(max_concurrent=2)
    for _ in range(5):
        async with aclosing(
            engine.submit(prompt_of(20), Sampling(max_tokens=300, ignore_eos=True))
        ) as tokens:
            await anext(tokens)
    assert engine.load() == Load(0, 0)
    assert ids(await run(engine, prompt_of(20))) == stock(model, prompt_of(20), 12)


async def test_logits_that_are_not_finite_are_an_error_and_pass(model: Any, start: Start) -> None:
    """A prompt that overflows the model is refused, at worst with those of the same steps; none is wrong."""
    broken = tiny()
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.model.embed_tokens.weight[150] = torch.nan
    engine = start(broken)
    good = [i for i in prompt_of(10) if i != 150]
    bad, beside = await asyncio.gather(run(engine, [150, 9]), run(engine, good), return_exceptions=True)
    assert isinstance(bad, Unavailable)
    assert isinstance(beside, Unavailable) or ids(beside) == stock(model, good, 12)  # type: ignore[arg-type]
    assert ids(await run(engine, good)) == stock(model, good, 12)
    assert engine.healthy()


async def test_a_dead_thread_is_noticed(engine: TorchEngine) -> None:
    """Whatever kills the manager: running requests fail, new ones too, and health says so."""
    assert engine.healthy()

    def explode(*_: Any) -> None:
        raise RuntimeError("no batch today")

    engine._sampler.prepare_tensor_args = explode  # type: ignore[method-assign,assignment]
    for _ in range(2):
        with pytest.raises(Unavailable):
            await run(engine, prompt_of(5))
    assert not engine.healthy()


async def test_a_hanging_engine_is_noticed(model: Any) -> None:
    """Requests inside and no step for longer than ``stall_s`` mean that it hangs."""
    now = 0.0
    engine = TorchEngine(model, Capacity(200, num_blocks=8, stall_s=10), clock=lambda: now)
    engine._inside = 1
    assert engine.healthy()
    now = 11.0
    assert not engine.healthy()
    engine._inside = 0
    assert engine.healthy()
    engine.close()


async def test_the_context_fits_the_cache(start: Start) -> None:
    """A context that the cache could never hold is not promised."""
    assert start(num_blocks=4, context_length=4096).context_length == 3 * PAGE


@pytest.fixture
def folder(model: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
async def test_a_folder_is_loaded_and_served(folder: Path, dtype: Any) -> None:
    """``dtype`` is what the model computes in; ``auto`` keeps what is stored."""
    engine = load(folder, dtype, Capacity(200, num_blocks=16), device="cpu")
    assert len(await run(engine, prompt_of(10), 5, ignore_eos=True)) == 5
    assert engine._manager.model.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    engine.close()


def test_pickles_are_never_read(folder: Path) -> None:
    """A checkpoint without safetensors is refused, even if transformers could read it."""
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(SetupError):
        load(folder, "auto", Capacity(200))


def test_folders_that_name_code_are_refused(folder: Path) -> None:
    """``auto_map`` is refused before anything is loaded."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.py--X"}}))
    with pytest.raises(UnsupportedOption, match="auto_map"):
        load(folder, "auto", Capacity(200))


@pytest.mark.parametrize("rule", [{"suppress_tokens": [5]}, {"repetition_penalty": 1.2}, {"num_beams": 2}])
def test_decoding_rules_that_would_be_ignored_are_refused(rule: dict[str, Any]) -> None:
    """A folder that changes greedy decoding by its own configuration would not be served faithfully."""
    other = tiny()
    other.generation_config = GenerationConfig.from_dict(rule)
    with pytest.raises(UnsupportedOption):
        TorchEngine(other, Capacity(200, num_blocks=8))


SMOLLM2 = Path.home() / ".cache" / "anamorph" / "smollm2-135m-instruct"


@pytest.mark.slow
@pytest.mark.skipif(
    not SMOLLM2.is_dir(), reason="the real weights are not on this machine: run `make demo` once"
)
async def test_greedy_on_real_weights() -> None:
    """SmolLM2 in float32: the engine's tokens are stock generate's, in one batch."""
    torch.set_num_threads(1)
    engine = load(SMOLLM2, "float32", Capacity(600, num_blocks=64), device="cpu")
    model = engine._manager.model
    prompts = [[100 + i for i in prompt_of(n, seed=n)] for n in (4, 70)]
    answers = await asyncio.gather(*(run(engine, p, 12, ignore_eos=True) for p in prompts))
    engine.close()
    assert [ids(a) for a in answers] == [stock(model, p, 12, eos_token_id=-1) for p in prompts]
