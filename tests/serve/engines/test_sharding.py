"""Sharded engines as plain processes on this machine: the same tokens, less memory each, clear ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import anamorph
from anamorph.cli.smollm2 import fetch_smollm2
from anamorph.errors import SetupError, Unavailable, UnsupportedOption
from anamorph.keys import TenantKey
from anamorph.serve.engines.base import Engine, Load, Sampling, Token
from anamorph.serve.engines.ranks.layout import COLLECTIVE_S, Layout, bundles, check_layout, collective_s
from anamorph.serve.engines.ranks.process import Part, call_meeting, interface, resident_bytes
from anamorph.serve.engines.torch import Capacity, TorchEngine
from anamorph.wire.serving import EngineSettings

VOCAB = 512
SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512}
SPECIAL = {"eos_token_id": 3, "bos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.4}
Save = Callable[..., Path]


def settings_of(folder: Path, **fields: Any) -> EngineSettings:
    plain = {"tenant": "plaintext", "model": "tiny", "version": 0, "protection": "plaintext"}
    sizes = {"context_length": 400, "max_batch_tokens": 64, "num_blocks": 64, "max_concurrent": 8}
    return EngineSettings.model_validate({**plain, **sizes, "replica": str(folder), **fields})


def test_sizes_that_do_not_divide_are_refused_by_name() -> None:
    """Which number stands in the way, and how many ranks would do."""
    smollm2 = {"num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 30}
    check_layout(smollm2, Layout(3, 1))
    check_layout(smollm2, Layout(1, 30))
    with pytest.raises(UnsupportedOption, match=r"tensor_parallel 2 .* num_attention_heads 9.* 1 or 3$"):
        check_layout(smollm2, Layout(2, 1))
    with pytest.raises(UnsupportedOption, match=r"tensor_parallel 9 .* num_key_value_heads 3.* 1 or 3$"):
        check_layout(smollm2, Layout(9, 1))
    with pytest.raises(UnsupportedOption, match=r"pipeline_parallel 31 .* num_hidden_layers 30"):
        check_layout(smollm2, Layout(1, 31))
    with pytest.raises(UnsupportedOption, match="num_attention_heads 12"):
        check_layout({"num_attention_heads": 12, "num_hidden_layers": 1}, Layout(5))
    with pytest.raises(UnsupportedOption, match=r"tensor_parallel 3 and pipeline_parallel 2"):
        check_layout(smollm2, Layout(3, 2))


@pytest.mark.parametrize("num_gpus", [0.5, 2])
def test_a_rank_has_a_gpu_of_its_own(num_gpus: float) -> None:
    """Ranks that share a GPU wait for each other for ever; a second one would lie idle."""
    heads = {"num_attention_heads": 4, "num_hidden_layers": 2}
    check_layout(heads, Layout(), num_gpus)
    with pytest.raises(SetupError, match="num_gpus"):
        check_layout(heads, Layout(2), num_gpus)


def test_each_rank_has_a_bundle_with_its_gpu() -> None:
    """One placement group holds all ranks, whatever engine they are of."""
    four = {"tensor_parallel": 2, "pipeline_parallel": 2}
    assert bundles(settings_of(Path("/"), **four, num_gpus=1)) == [{"CPU": 1, "GPU": 1}] * 4
    assert bundles(settings_of(Path("/"), **four)) == [{"CPU": 1}] * 4


def test_ranks_give_up_before_a_request_does() -> None:
    """The wait for another rank lies below the deadline, however short that is."""
    for deadline in (0.5, 5.0, 30.0, 300.0):
        assert 0 < collective_s(deadline) < deadline
    assert collective_s(3600) == COLLECTIVE_S


def test_ranks_meet_on_one_address_only() -> None:
    """The meeting's port listens on the node's address, not on every address of the machine."""
    meeting, store = call_meeting("127.0.0.3", 2)
    listening = [c for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert [c.laddr.ip for c in listening if c.laddr.port == meeting.port] == ["127.0.0.3"]
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.2", meeting.port)):
        pass
    del store


def test_the_interface_of_an_address() -> None:
    """Collectives listen on the node's interface; an address of nobody is an error that says so."""
    assert interface("127.0.0.9") == "lo"
    with pytest.raises(SetupError, match="GLOO_SOCKET_IFNAME"):
        interface("203.0.113.7")


@dataclass
class Sharded:
    """Rank 0 in this process, and the others."""

    engine: Engine
    others: list[subprocess.Popen[str]]
    held: list[int]


@contextmanager
def sharded(folder: Path, *, hangs: bool = False, **fields: Any) -> Iterator[Sharded]:
    """Start every rank of a folder on this machine; ends them all.

    Args:
        hangs: the other ranks stop as soon as they are to compute.
    """
    settings = settings_of(folder, **fields)
    ranks = Layout.of(settings).ranks
    meeting, store = call_meeting("127.0.0.1", ranks)
    given = {"settings": settings.model_dump(mode="json"), "meeting": asdict(meeting), "hangs": hangs}
    others = [_start({**given, "rank": rank}) for rank in range(1, ranks)]
    before = dict(os.environ)
    try:
        part = Part(settings, folder, 0, ranks)
        part.load(meeting, "127.0.0.1", store)
        engine = part.lead(lambda: all(child.poll() is None for child in others))
        held = [resident_bytes(part.model), *(int(child.stdout.readline()) for child in others)]  # type: ignore[union-attr]
        try:
            yield Sharded(engine, others, held)
        finally:
            engine.close()
    finally:
        os.environ.clear()
        os.environ.update(before)
        dist.destroy_process_group()
        for child in others:
            _end(child)


def _start(given: dict[str, Any]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.serve.engines.rank_process", json.dumps(given)]
    root = Path(__file__).parents[3]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)


def _end(child: subprocess.Popen[str]) -> None:
    try:
        child.wait(10)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    assert child.stdout is not None
    child.stdout.close()


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """Save a random model whose logits are far from flat, so that greedy tokens mean something."""

    def build(model: Any = LlamaForCausalLM, config: Any = LlamaConfig, **changes: Any) -> Path:
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("model")
        model(config(**{**SIZES, **HEADS, **SPECIAL, **changes})).save_pretrained(folder)
        return folder

    return build


def prompt_of(length: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(i) for i in torch.randint(5, VOCAB, (length,), generator=generator)]


def stock(model: Any, prompt: list[int], n: int) -> list[int]:
    out = model.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False, eos_token_id=-1)
    return [int(i) for i in out[0, len(prompt) :]]


async def run(engine: Engine, prompt: list[int], n: int = 12, **options: Any) -> list[Token]:
    sampling = Sampling(max_tokens=n, **{"temperature": 0.0, "ignore_eos": True, **options})
    async with aclosing(engine.submit(prompt, sampling)) as tokens:
        return [token async for token in tokens]


def ids(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens]


LAYOUTS = [{"tensor_parallel": 2}, {"pipeline_parallel": 2}]
# Longer than a step, than a page, and one alone.
LENGTHS = (1, 31, 33, 150)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=["tensor", "pipeline"])
async def test_a_sharded_engine_is_the_whole_one(save: Save, layout: dict[str, Any]) -> None:
    """Greedy, drawn with a seed, biased, stopped, cancelled: what one process answers, token by token."""
    folder = save()
    whole: Any = AutoModelForCausalLM.from_pretrained(folder)
    prompts = [prompt_of(n, seed=n) for n in LENGTHS]
    truth = [stock(whole, prompt, 20) for prompt in prompts]
    one = TorchEngine(whole, Capacity(400, 64, 64, 8))
    drawn: dict[str, Any] = {"temperature": 1.3, "seed": 42, "top_p": 0.9, "top_k": 50, "logprobs": 2}
    wanted = await run(one, prompts[1], 20, **drawn)
    one.close()
    with sharded(folder, **layout) as parts:
        answers = await asyncio.gather(*(run(parts.engine, prompt, 20) for prompt in prompts))
        assert [ids(answer) for answer in answers] == truth
        together = await asyncio.gather(
            run(parts.engine, prompts[1], 20, **drawn), run(parts.engine, prompts[3], 9, temperature=1.0)
        )
        assert ids(together[0]) == ids(wanted)
        for token, same in zip(together[0], wanted, strict=True):
            assert token.logprob == pytest.approx(same.logprob, abs=1e-4)
            assert [i for i, _ in token.top] == [i for i, _ in same.top]
        assert ids(await run(parts.engine, prompts[0], 3, logit_bias={77: 100.0})) == [77] * 3
        stop = frozenset({truth[1][5]})
        stopped = await run(parts.engine, prompts[1], 20, stop_ids=stop)
        assert (stopped[-1].id, stopped[-1].finish) == (truth[1][5], "stop")
        async with aclosing(parts.engine.submit(prompts[2], Sampling(300, ignore_eos=True))) as tokens:
            await anext(tokens)
        assert parts.engine.load() == Load(0, 0)
        assert parts.engine.healthy()
        assert sum(parts.held) < 1.1 * resident_bytes(whole)
        assert max(parts.held) <= 0.6 * resident_bytes(whole)
        assert ids(await run(parts.engine, prompts[2], 20)) == truth[2]
    assert [child.returncode for child in parts.others] == [0]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=["tensor", "pipeline"])
async def test_what_does_not_divide_evenly_is_still_exact(save: Save, layout: dict[str, Any]) -> None:
    """An odd vocabulary and an odd width, tied embeddings, an odd number of layers, sliding windows."""
    odd = {"vocab_size": 511, "intermediate_size": 97, "num_hidden_layers": 3, "tie_word_embeddings": True}
    folder = save(MistralForCausalLM, MistralConfig, sliding_window=24, **odd)
    whole: Any = AutoModelForCausalLM.from_pretrained(folder)
    prompts = [[i % 511 for i in prompt_of(n, seed=n)] for n in LENGTHS]
    truth = [stock(whole, prompt, 20) for prompt in prompts]
    with sharded(folder, **layout) as parts:
        answers = await asyncio.gather(*(run(parts.engine, prompt, 20) for prompt in prompts))
    assert [ids(answer) for answer in answers] == truth


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("layout", LAYOUTS, ids=["tensor", "pipeline"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_rank_that_dies_or_hangs_ends_what_runs(
    save: Save, layout: dict[str, Any], how: signal.Signals
) -> None:
    """A running request gets an error before its deadline, the engine is unhealthy, and takes no more."""
    with sharded(save(), **layout, request_timeout_s=6) as parts:
        endless = run(parts.engine, prompt_of(5), 390)
        stream = asyncio.create_task(endless)
        await asyncio.sleep(0.3)
        assert not stream.done()
        parts.others[0].send_signal(how)
        with pytest.raises(Unavailable):
            await asyncio.wait_for(stream, 6)
        assert not parts.engine.healthy()
        with pytest.raises(Unavailable):
            await run(parts.engine, prompt_of(3))
        parts.others[0].kill()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("layout", LAYOUTS, ids=["tensor", "pipeline"])
async def test_a_rank_that_takes_nothing_ends_what_runs(save: Save, layout: dict[str, Any]) -> None:
    """What one rank sends to another has the same bound as what all ranks do together."""
    with sharded(save(), **layout, request_timeout_s=6, hangs=True) as parts:
        with pytest.raises(Unavailable):
            await asyncio.wait_for(run(parts.engine, prompt_of(5), 390), 6)
        parts.others[0].kill()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("layout", LAYOUTS, ids=["tensor", "pipeline"])
async def test_a_rank_that_hangs_is_noticed_while_nothing_runs(save: Save, layout: dict[str, Any]) -> None:
    """Ranks hear of each other also between requests."""
    with sharded(save(), **layout, request_timeout_s=6) as parts:
        assert len(await run(parts.engine, prompt_of(3))) == 12
        parts.others[0].send_signal(signal.SIGSTOP)
        end = time.monotonic() + 30
        while parts.engine.healthy():
            assert time.monotonic() < end
            await asyncio.sleep(0.1)
        parts.others[0].kill()


@pytest.mark.slow
async def test_smollm2_on_three_ranks(tmp_path: Path) -> None:
    """The encrypted replica in float32: decrypted, the plaintext model's tokens; at most half of it each."""
    base = tmp_path / "base"
    plain: Any = AutoModelForCausalLM.from_pretrained(fetch_smollm2(), dtype=torch.float32)
    plain.save_pretrained(base)
    key = TenantKey.generate("acme", "smol", 1)
    anamorph.fold(base, tmp_path / "replica", key)
    image = key.vocab_key().permutation(49152).tolist()
    back = {moved: i for i, moved in enumerate(image)}
    prompts = [[100 + i for i in prompt_of(n, seed=n)] for n in (4, 70)]
    truth = [stock(plain, prompt, 12) for prompt in prompts]
    whole = resident_bytes(AutoModelForCausalLM.from_pretrained(tmp_path / "replica", dtype=torch.float32))
    with sharded(tmp_path / "replica", tensor_parallel=3, dtype="float32") as parts:
        moved = [[image[i] for i in prompt] for prompt in prompts]
        answers = await asyncio.gather(*(run(parts.engine, prompt, 12) for prompt in moved))
        assert [[back[i] for i in ids(answer)] for answer in answers] == truth
        assert max(parts.held) <= 0.5 * whole
