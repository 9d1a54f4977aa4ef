"""What a noisy neighbour costs: one tenant's time to the first token while another sends ten times its share.

    python benchmarks/neighbours.py [--engine torch] [--samples 2500] [--noise 10] [--json FILE]

Two tenants share one engine of two slots. Its capacity is measured first, with both sending
all they can; the fair share of each is half of it, and both are given 80 % of that, at random
moments (Poisson). Then one of them sends ``--noise`` times as much. Rounds of both kinds
alternate, and latency counts from the intended moment, so that nobody is spared by waiting.
``--engine torch`` computes with SmolLM2 under two keys, in place of the fake engine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from base64 import b64encode
from collections import Counter
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np

import anamorph
from anamorph import telemetry
from anamorph.cli.machine.model import default_model
from anamorph.errors import TooManyRequests
from anamorph.keys import TenantKey
from anamorph.serve.applications.pool import open_backend
from anamorph.serve.engines.base import Sampling
from anamorph.serve.slots.base import Backend, Opened
from anamorph.serve.slots.engine import SlotEngine
from anamorph.serve.slots.fairness import Limits
from anamorph.serve.slots.metrics import PoolMetrics
from anamorph.serve.slots.scheduler import Scheduler
from anamorph.wire.serving import PoolMember, PoolSettings

QUIET, NOISY = "quiet", "noisy"
LOAD = 0.8
PROMPT, ANSWER = 16, 8
PLACES = 8
# As an endpoint bounds it: beyond these a tenant's sequences are refused.
INSIDE = PLACES + 64
FAKE = "fake:?vocab_size=1000&delay_ms=5&token_ms=0.1"
RESAMPLES = 2000
LIMIT = 1.5  # of the fake engine; with a real model its own steps add to what a neighbour does


class Tenants:
    """An engine and its two members."""

    def __init__(self, backend: Backend, members: list[PoolMember], observed: telemetry.Telemetry) -> None:
        self.opened: dict[str, Opened] = {}
        self.keys = {member.tenant: member.key_id for member in members}
        self.engine = SlotEngine(backend, Scheduler(2, PLACES), PoolMetrics(observed.meter, "bench"))
        for member in members:
            self.opened[member.tenant] = backend.open(member)
            self.engine.put(member.key_id, Limits(max_concurrent=PLACES))
        self.rng = random.Random(1)  # noqa: S311 - traffic, not secrets

    async def first_token(self, tenant: str, due: float) -> float:
        """Seconds from ``due`` to the first token of one request, which is then read to its end."""
        key_id, opened = self.keys[tenant], self.opened[tenant]
        load = self.engine.load(key_id)
        if load.running + load.waiting >= INSIDE:
            raise TooManyRequests("the queue is full")
        prompt = [self.rng.randrange(opened.vocab_size) for _ in range(PROMPT)]
        sampling = Sampling(ANSWER, temperature=0.0, ignore_eos=True)
        first = 0.0
        async with aclosing(self.engine.submit(key_id, opened, prompt, sampling)) as tokens:
            async for _ in tokens:
                first = first or asyncio.get_running_loop().time() - due
        return first

    async def capacity(self, seconds: float) -> float:
        """Requests per second of both together, each sending all it can."""
        loop, done = asyncio.get_running_loop(), 0
        start = loop.time()
        end = start + seconds

        async def busy(tenant: str) -> None:
            nonlocal done
            while loop.time() < end:
                await self.first_token(tenant, loop.time())
                done += 1

        await asyncio.gather(*(busy(tenant) for tenant in self.keys for _ in range(PLACES)))
        # What had begun before the end is counted, and so is the time that it took beyond it.
        return done / (loop.time() - start)

    async def round(self, rates: dict[str, float], seconds: float) -> tuple[list[float], Counter[str]]:
        """First-token times of the quiet tenant, and how many requests of each were refused."""
        loop, times, refused = asyncio.get_running_loop(), list[float](), Counter[str]()
        start = loop.time()

        async def one(tenant: str, due: float) -> None:
            await asyncio.sleep(max(0.0, due - loop.time()))
            try:
                first = await self.first_token(tenant, due)
            except TooManyRequests:
                refused[tenant] += 1
                return
            if tenant == QUIET:
                times.append(first)

        await asyncio.gather(
            *(one(t, start + at) for t, rate in rates.items() for at in poisson(rate, seconds, self.rng))
        )
        return times, refused


def poisson(rate: float, seconds: float, rng: random.Random) -> list[float]:
    """Moments of a Poisson process."""
    moments, now = list[float](), rng.expovariate(rate)
    while now < seconds:
        moments.append(now)
        now += rng.expovariate(rate)
    return moments


def say(text: str) -> None:
    print(f"{time.strftime('%X')} {text}", file=sys.stderr, flush=True)


async def measure(tenants: Tenants, samples: int, noise: float, rounds: int, warm_s: float) -> dict[str, Any]:
    """Alternate quiet and noisy rounds."""
    await tenants.capacity(warm_s)
    capacity = await tenants.capacity(warm_s)
    share = capacity / 2 * LOAD
    seconds = samples / share / rounds
    say(f"capacity {capacity:.1f}/s; {2 * rounds} rounds of {seconds:.0f} s")
    kinds: dict[float, list[list[float]]] = {1.0: [], noise: []}
    refused = Counter[str]()
    for number in range(rounds):
        for factor, taken in kinds.items():
            times, more = await tenants.round({QUIET: share, NOISY: share * factor}, seconds)
            taken.append(times)
            refused += more
            p99 = float(np.percentile(times, 99)) * 1000 if times else float("nan")
            say(
                f"round {number + 1}/{rounds}, {factor:g} x its share: {len(times)} samples, p99 {p99:.0f} ms"
            )
    fair, loud = kinds.values()
    await tenants.engine.close()
    return {
        "capacity_requests_per_s": round(capacity, 1),
        "share_requests_per_s": round(share, 1),
        "samples": [sum(map(len, fair)), sum(map(len, loud))],
        "noise_refused": refused[NOISY],
        "quiet_refused": refused[QUIET],  # they would be the slowest: the ratio then says too little
        "ttft_p50_ms": [milliseconds(fair, 50), milliseconds(loud, 50)],
        "ttft_p99_ms": [milliseconds(fair, 99), milliseconds(loud, 99)],
        "p99_ratio": ratio(fair, loud),
    }


def milliseconds(rounds: list[list[float]], percentile: float) -> float:
    """A percentile of all rounds together."""
    return round(float(np.percentile(np.concatenate(rounds), percentile)) * 1000, 2)


def ratio(fair: list[list[float]], loud: list[list[float]]) -> dict[str, float]:
    """Noisy over fair p99, with a 95 % percentile interval over resampled rounds and requests in them."""
    rng = np.random.default_rng(1)

    def p99(rounds: list[list[float]], drawn: Any) -> float:
        parts = [np.asarray(rounds[i])[rng.integers(0, len(rounds[i]), len(rounds[i]))] for i in drawn]
        return float(np.percentile(np.concatenate(parts), 99))

    count = len(fair)
    ratios = [p99(loud, d) / p99(fair, d) for d in rng.integers(0, count, (RESAMPLES, count))]
    low, high = np.quantile(ratios, [0.025, 0.975])
    point = milliseconds(loud, 99) / milliseconds(fair, 99)
    return {"ratio": round(point, 3), "low": round(float(low), 3), "high": round(float(high), 3)}


def fake_members() -> list[PoolMember]:
    """Two tenants without files."""
    return [member(name, FAKE, f"{name}.smol.v1.{'0' * 16}", "", "") for name in (QUIET, NOISY)]


def real_members(folder: Path) -> list[PoolMember]:
    """Two tenants of SmolLM2, folded into ``folder``; in float32, for a CPU is slow in bfloat16."""
    made = []
    for name in (QUIET, NOISY):
        key = TenantKey.generate(name, "smol", 1)
        manifest = anamorph.fold(default_model("float32", print), folder / name, key)
        anchor = b64encode(key.public_key()).decode()
        made.append(member(name, str(folder / name), key.id, anchor, manifest.sha256()))
    return made


def member(name: str, replica: str, key_id: str, anchor: str, digest: str) -> PoolMember:
    """One version of one tenant."""
    return PoolMember(
        tenant=name,
        model="smol",
        version=1,
        replica=replica,
        key_id=key_id,
        public_key=anchor,
        manifest_sha256=digest,
    )


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="Measure what a noisy neighbour costs.")
    parser.add_argument("--engine", choices=["fake", "torch"], default="fake")
    parser.add_argument("--samples", type=int, default=2500)
    parser.add_argument("--noise", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm", type=float, help="seconds of each of two runs at full load; 3, of torch 10")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        members = fake_members() if options.engine == "fake" else real_members(Path(scratch))
        settings = PoolSettings(
            pool="bench", engine=options.engine, context_length=256, num_blocks=64, max_concurrent=PLACES
        )
        warm_s = options.warm or (3.0 if options.engine == "fake" else 10.0)
        observed = telemetry.build("anamorph-bench")
        backend = open_backend(settings)

        async def run() -> dict[str, Any]:
            tenants = Tenants(backend, members, observed)
            return await measure(tenants, options.samples, options.noise, options.rounds, warm_s)

        result = {"engine": options.engine, **asyncio.run(run())}
        observed.shutdown()
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if result["quiet_refused"]:
        sys.exit(
            f"{result['quiet_refused']} requests of the quiet tenant were refused: they are in no figure"
        )
    if options.engine == "fake" and result["p99_ratio"]["ratio"] > LIMIT:
        sys.exit(f"the neighbour raises the quiet tenant's p99 by more than {LIMIT}")


if __name__ == "__main__":
    main()
