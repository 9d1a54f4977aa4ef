"""What the serving path costs beside the engine it serves.

    python benchmarks/serving_path.py [--pairs 40] [--rounds 30] [--tokens 1024] [--json FILE]

Two questions:
1. SmolLM2: a request through Ray Serve (proxy, authentication, events, JSON) against the same engine
   called in this process, in turn, prompts of equal length; ratio with its 95 % interval.
2. Microseconds for each streamed token: the fake engine, which computes nothing, called in this
   process, over one hop (the engine is the HTTP ingress), and through the door, which forwards. It
   answers as fast as tokens are taken from it, so the time for a token is what the path needs for it.

Only on a quiet machine: Linux shares the cores among sessions, and Ray has one of its own, so that beside
other work the bare engine gets less of them than the served one, and looks slow.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# As in the engines' own processes: threads that wait for work sleep, else they would take the other side's.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

from benchmarks.overhead import add, cluster_of, plaintext_args  # noqa: E402 -- the checkout, not a package
from tests.serve.conftest import Cluster, until  # noqa: E402 -- as above

from anamorph.canary import Sample, Target, paired_ratio, random_ids  # noqa: E402 -- as above
from anamorph.canary.sample import take  # noqa: E402 -- as above
from anamorph.canary.statistics import Ratio  # noqa: E402 -- as above
from anamorph.cli.machine.model import default_model  # noqa: E402 -- as above
from anamorph.cli.machine.signals import end_as_interrupt  # noqa: E402 -- as above
from anamorph.serve.engines.base import Engine, Sampling  # noqa: E402 -- as above
from anamorph.serve.engines.fake import FakeEngine  # noqa: E402 -- as above
from anamorph.wire.serving import APP_IMPORT_PATH, app_name, route_prefix  # noqa: E402 -- as above

PROMPT, OUTPUT = 64, 32
VOCAB = 50_000
LIMIT = 1.05
# A load average at which somebody else is at work.
BUSY = 1.0


class Bare:
    """An engine in this process, timed as ``canary.take`` times an endpoint."""

    def __init__(self, engine: Engine, runner: asyncio.Runner) -> None:
        self._engine, self._runner = engine, runner

    def take(self, prompt: list[int], tokens: int) -> Sample:
        """One answer of ``tokens`` tokens."""
        return self._runner.run(self._take(prompt, tokens))

    async def _take(self, prompt: list[int], tokens: int) -> Sample:
        began = time.perf_counter()
        sampling = Sampling(max_tokens=tokens, temperature=0, ignore_eos=True)
        async with aclosing(self._engine.submit(prompt, sampling)) as answer:
            arrivals = [(time.perf_counter() - began, 1) async for _ in answer]
        return Sample(tuple(arrivals), time.perf_counter() - began)


@contextmanager
def torch_engine(base: Path) -> Iterator[Engine]:
    """The engine of an application, with its settings, in this process."""
    # Imported here: the half with the fake engine does without torch.
    import torch

    from anamorph.serve.engines.torch import Capacity, load

    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as a replica does
    engine: Engine = load(base, "float32", Capacity(context_length=1024, num_blocks=64))
    try:
        yield engine
    finally:
        engine.close()


def path_against_engine(cluster: Cluster, base: Path, pairs: int) -> dict[str, Any]:
    """Ratios of TTFT, TPOT and the whole, path over bare engine, and the times themselves."""
    endpoint, rng = add(cluster, plaintext_args(base)), np.random.default_rng()
    vocab = int(json.loads((base / "config.json").read_text())["vocab_size"])
    taken: dict[str, list[Sample]] = {"path": [], "bare": []}
    with (
        torch_engine(base) as engine,
        asyncio.Runner() as runner,
        httpx.Client(timeout=300, trust_env=False) as http,
    ):
        inside = Bare(engine, runner)

        def path(prompt: list[int]) -> Sample:
            token = cluster.token(tenant="plaintext", model="smollm2")
            return take(http, Target(endpoint, token), prompt, OUTPUT, time.perf_counter)

        sides: dict[str, Callable[[list[int]], Sample]]
        sides = {"path": path, "bare": lambda prompt: inside.take(prompt, OUTPUT)}
        for number in range(3 + pairs):
            for side in rng.permutation(list(sides)):
                sample = sides[side](random_ids(rng, vocab, PROMPT))
                if number >= 3:
                    taken[side].append(sample)
            if number % 10 == 9:
                print(f"{max(0, number - 2)}/{pairs} pairs with SmolLM2", file=sys.stderr, flush=True)
    ratios = {name: asdict(_ratio(taken, name)) for name in ("ttft", "tpot", "e2el")}
    return {"ratios": ratios, "ms": {side: _milliseconds(samples) for side, samples in taken.items()}}


def _milliseconds(samples: list[Sample]) -> dict[str, list[float]]:
    """Every sample's times: a ratio that is odd shows here on which side it is, and when."""
    return {name: [round(getattr(one, name) * 1e3, 2) for one in samples] for name in ("ttft", "tpot")}


def _ratio(taken: dict[str, list[Sample]], measure: str) -> Ratio:
    path, engine = ([getattr(one, measure) for one in taken[side]] for side in ("path", "bare"))
    return paired_ratio(path, engine, seed=0)


def add_fakes(cluster: Cluster) -> dict[str, tuple[str, str]]:
    """Endpoint and key id of the fake engine with a route of its own, and behind the door."""
    cluster.serve(1, replica=f"fake:?vocab_size={VOCAB}", context_length=8192)
    first = cluster.apps[app_name("acme", "smol", 1)]
    name, key_id = app_name("acme", "smol", 2), first["args"]["key_id"].replace(".v1.", ".v2.")
    cluster.apps[name] = {
        "name": name,
        "route_prefix": None,
        "import_path": APP_IMPORT_PATH,
        "args": first["args"] | {"version": 2, "key_id": key_id},
        "deployments": first["deployments"],
    }
    cluster.door([{"version": 2, "key_id": key_id, "status": "serving", "app": name}])
    until(name, lambda: cluster.state(name)["status"] == "RUNNING")
    behind = cluster.ray.serve_url + route_prefix("acme", "smol", 2)
    return {"one hop": (cluster.endpoint(1), first["args"]["key_id"]), "door": (behind, key_id)}


def per_token(cluster: Cluster, rounds: int, tokens: int) -> dict[str, list[float]]:
    """Microseconds per token of each way, round by round."""
    rng, places = np.random.default_rng(), add_fakes(cluster)
    engine = FakeEngine("acme.smol.v1.0123456789abcdef", vocab_size=VOCAB, context_length=8192)
    with asyncio.Runner() as runner, httpx.Client(timeout=300, trust_env=False) as http:
        inside = Bare(engine, runner)

        def over(place: tuple[str, str]) -> Callable[[list[int]], Sample]:
            endpoint, key_id = place
            return lambda prompt: take(
                http, Target(endpoint, cluster.token(), key_id), prompt, tokens, time.perf_counter
            )

        ways: dict[str, Callable[[list[int]], Sample]] = {"engine": lambda p: inside.take(p, tokens)}
        ways |= {name: over(place) for name, place in places.items()}
        found: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(3 + rounds):
            for name in rng.permutation(list(ways)):
                sample = ways[name](random_ids(rng, VOCAB, 16))
                if number >= 3:
                    found[name].append(sample.e2el / sample.tokens * 1e6)
    return found


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median with the ends of its 95 % bootstrap interval."""
    one = paired_ratio(values, [1.0] * len(values), seed=0)
    return one.median, one.low, one.high


def main() -> None:
    """Measure and print; exit 1 where the ratio's median lies above the limit."""
    end_as_interrupt()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=40, help="with SmolLM2; 0 leaves it out")
    parser.add_argument("--rounds", type=int, default=30, help="with the fake engine; 0 leaves it out")
    parser.add_argument("--tokens", type=int, default=1024, help="of each of these streams")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {"load_before": os.getloadavg()[0]}
    if found["load_before"] > BUSY or os.nice(0) > 0:
        print("the machine is busy or this is niced: the ratios will say little", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="an-") as folder, cluster_of(Path(folder)) as cluster:
        if args.rounds:
            found["us_per_token"] = {
                name: interval(values)
                for name, values in per_token(cluster, args.rounds, args.tokens).items()
            }
            cluster.apps.clear()
            cluster.put()
        if args.pairs:
            found |= path_against_engine(cluster, default_model("float32", print), args.pairs)
    for name, (middle, low, high) in found.get("us_per_token", {}).items():
        print(f"{name:<8} {middle:7.1f} µs per token  ({low:.1f} – {high:.1f})")
    for name, one in found.get("ratios", {}).items():
        medians = (
            [float(np.median(found["ms"][side][name])) for side in ("path", "bare")] if name != "e2el" else []
        )
        beside = "  medians {:.1f} and {:.1f} ms".format(*medians) if medians else ""
        print(
            f"{name:<5} path over engine {one['median']:.4f}  ({one['low']:.4f} – {one['high']:.4f}){beside}"
        )
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(any(found["ratios"][name]["median"] > LIMIT for name in ("ttft", "tpot")) if args.pairs else 0)


if __name__ == "__main__":
    main()
