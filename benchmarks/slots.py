"""Many tenants of SmolLM2 on one engine with few slots: right answers, swap time, memory.

    python benchmarks/slots.py [--tenants 30] [--slots 4] [--requests 150] [--replicas FOLDER] [--json FILE]

Each tenant has a replica of his own, folded (``rotate``) from SmolLM2-135M-Instruct in
float32 and computed in float32. Requests come with Zipf popularity and all at once, as many
at a time as ``--clients``; each answer is compared with the plaintext model's greedy
tokens under the tenant's permutation. Then swaps are timed, each beside one copy of as many
bytes between two arrays that have been touched before: from files that the kernel has cached, and before
a GPU also from copies in host memory. ``--replicas`` keeps the replicas for the next time.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import statistics
import sys
import tempfile
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM

import anamorph
from anamorph import telemetry
from anamorph.canary.statistics import paired_ratio
from anamorph.cli.smollm2 import fetch_smollm2
from anamorph.keys import TenantKey
from anamorph.replica import ReplicaManifest
from anamorph.serve.applications.pool import open_backend
from anamorph.serve.engines.base import Sampling
from anamorph.serve.engines.torch import default_device
from anamorph.serve.slots.base import Opened
from anamorph.serve.slots.engine import SlotEngine
from anamorph.serve.slots.fairness import Limits
from anamorph.serve.slots.metrics import PoolMetrics
from anamorph.serve.slots.scheduler import Scheduler
from anamorph.serve.slots.torch import TorchBackend
from anamorph.wire.serving import PoolMember, PoolSettings

ANSWER = 16
LIMIT = 1.5  # times a copy; before a GPU, of a swap from host memory
PLACES = 8
PROMPTS = 12
LENGTHS = (5, 33, 70, 130)  # below one page of the cache, and several


@dataclass(frozen=True)
class Tenant:
    """A member and the ids that stand for the plaintext's."""

    member: PoolMember
    image: list[int]

    def encrypted(self, ids: list[int]) -> list[int]:
        """Ids under this tenant's key."""
        return [self.image[token] for token in ids]


class Swaps(PoolMetrics):
    """What the pool reports, kept."""

    def __init__(self, meter: Any) -> None:
        super().__init__(meter, "bench")
        self.seconds: list[float] = []
        self.hits: Counter[bool] = Counter()

    def swapped(self, seconds: float, copied: int) -> None:
        """A replica was copied into a slot."""
        super().swapped(seconds, copied)
        self.seconds.append(seconds)

    def requested(self, *, hit: bool) -> None:
        """A sequence arrived."""
        super().requested(hit=hit)
        self.hits[hit] += 1


def float32_base(folder: Path) -> Path:
    """SmolLM2 stored in float32, which loses nothing."""
    if not folder.exists():
        model = AutoModelForCausalLM.from_pretrained(fetch_smollm2(), dtype=torch.float32)
        model.save_pretrained(folder)
    return folder


def tenant(base: Path, folder: Path, name: str, vocab_size: int) -> Tenant:
    """Fold a replica, unless it is there already."""
    key = TenantKey.from_root(hashlib.sha256(f"bench {name}".encode()).digest(), name, "smol", 1)
    if not folder.exists():
        anamorph.fold(base, folder, key)
    manifest = ReplicaManifest.model_validate_json((folder / "anamorph.json").read_bytes())
    member = PoolMember(
        tenant=name,
        model="smol",
        version=1,
        replica=str(folder),
        key_id=key.id,
        public_key=b64encode(key.public_key()).decode(),
        manifest_sha256=manifest.sha256(),
    )
    return Tenant(member, key.vocab_key().permutation(vocab_size).tolist())


def questions(base: Path, rng: random.Random) -> list[tuple[list[int], list[int]]]:
    """Plain prompts and what the plaintext model answers, greedily."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    made = []
    for number in range(PROMPTS):
        length = LENGTHS[number % len(LENGTHS)]
        prompt = torch.tensor([[rng.randrange(10, model.config.vocab_size) for _ in range(length)]])
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=ANSWER, do_sample=False
        )
        made.append((prompt[0].tolist(), out[0, length:].tolist()))
    return made


async def serve(
    engine: SlotEngine,
    tenants: list[Tenant],
    opened: dict[str, Opened],
    asked: list[tuple[list[int], list[int]]],
    requests: int,
    clients: int,
    rng: random.Random,
) -> dict[str, Any]:
    """Zipf load; how many answers were wrong, and how long they took."""
    places, wrong, times = asyncio.Semaphore(clients), 0, list[float]()
    weights = [1 / rank for rank in range(1, len(tenants) + 1)]
    # Everyone at least once, the popular ones more often.
    chosen = [*tenants, *rng.choices(tenants, weights, k=requests - len(tenants))]
    rng.shuffle(chosen)
    memory = Peak()

    async def one(who: Tenant, plain: list[int], answer: list[int]) -> None:
        nonlocal wrong
        async with places:
            began, ids, key_id = time.perf_counter(), list[int](), who.member.key_id
            sampling = Sampling(ANSWER, temperature=0.0)
            tokens = engine.submit(key_id, opened[key_id], who.encrypted(plain), sampling)
            async with aclosing(tokens):
                async for token in tokens:
                    if not ids:
                        times.append(time.perf_counter() - began)
                    ids.append(token.id)
            wrong += ids != who.encrypted(answer)
            memory.look()

    began = time.perf_counter()
    await asyncio.gather(*(one(who, *rng.choice(asked)) for who in chosen))
    return {
        "requests": requests,
        "wrong": wrong,
        "seconds": round(time.perf_counter() - began, 1),
        "ttft_p50_s": round(statistics.median(times), 3),
        "ttft_p99_s": round(statistics.quantiles(times, n=100)[98], 3),
        "rss_peak_mb": memory.peak_mb,
        "anonymous_peak_mb": memory.anonymous_mb,
    }


class Peak:
    """The most memory that this process had, of all kinds, and apart from mapped files."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.peak_mb = self.anonymous_mb = 0

    def look(self) -> None:
        """Look at it now."""
        info = self._process.memory_info()
        self.peak_mb = max(self.peak_mb, info.rss // 10**6)
        self.anonymous_mb = max(self.anonymous_mb, (info.rss - info.shared) // 10**6)


def copy_source(size: int) -> torch.Tensor:
    """As many bytes in host memory, page-locked before a GPU."""
    source = torch.ones(size // 4)
    return source if default_device() == "cpu" else source.pin_memory()


def copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """What a swap is measured against."""
    target.copy_(source, non_blocking=True)
    if target.is_cuda:
        torch.cuda.synchronize()


def paired(swap: Callable[[], int], pairs: int) -> dict[str, Any]:
    """Time swaps, each followed or preceded by a plain copy of as many bytes."""
    size = swap()
    source, target = copy_source(size), torch.ones(size // 4, device=default_device())
    swaps, copies = list[float](), list[float]()
    for number in range(pairs):
        first, second = (swaps, swap), (copies, lambda: copy(source, target))
        for times, work in (first, second) if number % 2 else (second, first):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
    ratio = paired_ratio(swaps, copies, seed=1)
    return {
        "bytes": size,
        "pairs": pairs,
        "swap_ms": round(statistics.median(swaps) * 1000, 1),
        "copy_ms": round(statistics.median(copies) * 1000, 1),
        "ratio": [round(value, 3) for value in (ratio.median, ratio.low, ratio.high)],
    }


def time_swaps(backend: TorchBackend, tenants: list[Tenant], pairs: int) -> dict[str, Any]:
    """Swaps between replicas in files, and before a GPU between copies in host memory."""
    slot, keys = backend.slot(0), [one.member.key_id for one in tenants[:2]]
    turn = 0

    def swap() -> int:
        nonlocal turn
        turn += 1
        return slot.load(keys[turn % 2])

    def anew() -> int:
        backend.drop(keys[(turn + 1) % 2])
        return swap()

    swap()
    kept = {} if default_device() == "cpu" else {"swap_from_host_memory": paired(swap, pairs)}
    return kept | {"swap_from_cached_files": paired(anew, pairs)}


def main() -> None:
    """Parse, fold, measure, print."""
    parser = argparse.ArgumentParser(description="Measure a pool of many tenants.")
    parser.add_argument("--tenants", type=int, default=30)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--host-bytes", type=int, default=3 * 2**30)
    parser.add_argument("--replicas", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = run(options, options.replicas or Path(scratch))
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if result["wrong"]:
        sys.exit(f"{result['wrong']} answers were wrong")
    swap = next(value["ratio"][0] for name, value in result.items() if name.startswith("swap_from"))
    if swap > LIMIT:
        sys.exit(f"a swap takes {swap} times what copying as many bytes does, more than {LIMIT}")


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The whole measurement, with replicas in ``folder``."""
    rng = random.Random(1)  # noqa: S311 - traffic, not secrets
    base = float32_base(folder / "base")
    vocab_size = json.loads((base / "config.json").read_text())["vocab_size"]
    tenants = [tenant(base, folder / f"t{i}", f"t{i}", vocab_size) for i in range(options.tenants)]
    settings = PoolSettings(
        pool="bench",
        dtype="float32",
        context_length=256,
        slots=options.slots,
        host_bytes=options.host_bytes,
        max_batch_tokens=512,
        num_blocks=128,
        max_concurrent=PLACES,
    )
    asked = questions(base, rng)
    observed = telemetry.build("anamorph-bench")
    backend = open_backend(settings)
    assert isinstance(backend, TorchBackend)
    opened = {one.member.key_id: backend.open(one.member) for one in tenants}

    async def served() -> dict[str, Any]:
        metrics = Swaps(observed.meter)
        engine = SlotEngine(backend, Scheduler(settings.slots, PLACES), metrics)
        for one in tenants:
            engine.put(one.member.key_id, Limits(max_concurrent=PLACES))
        result = await serve(engine, tenants, opened, asked, options.requests, options.clients, rng)
        host = backend.resident_bytes()
        timed = await asyncio.to_thread(time_swaps, backend, tenants, options.pairs)
        await engine.close()
        swaps = {
            "swaps": len(metrics.seconds),
            "swap_p50_s": round(statistics.median(metrics.seconds), 3),
            "hits": metrics.hits[True],
            "misses": metrics.hits[False],
            "host_memory_mb": host // 10**6,
            "host_limit_mb": settings.host_bytes // 10**6,
        }
        return {**result, **swaps, **timed}

    result = asyncio.run(served())
    observed.shutdown()
    return {"tenants": options.tenants, "slots": options.slots, "device": default_device(), **result}


if __name__ == "__main__":
    main()
