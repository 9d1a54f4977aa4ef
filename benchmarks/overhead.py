"""What encryption costs: SmolLM2, encrypted against plaintext, on the real serving path.

    python benchmarks/overhead.py [--lives 10] [--seconds 60] [--num-gpus 0.5] [--json FILE]

Two applications of one Ray, the base and its replica, both just written in the same layout, on the
same engine with the same settings, one request at a time, in pairs: independent random prompts of
equal length, drawn order, lengths in turn; long answers for the time per further token, and twice as
many short ones for the time to the first. Two processes of one program differ by a few per cent for
as long as they live, and so do two copies of one file, from where their pages happen to lie: so
files are copied and both sides started anew, in drawn order, ``--lives`` times. Reported is the median
of the pairs' ratios with its 95 % interval, of a bootstrap in two stages: lives are drawn, then pairs of
each of them within each length. ``--control`` serves the base on both sides: what is left is the error
of the method, and its interval must hold 1. ``--num-gpus`` is of each side: half a GPU puts both on
one. A life takes 40 s more than ``--seconds``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.serve.conftest import Cluster, Issuer, until  # noqa: E402 -- the checkout, not a package

import anamorph  # noqa: E402 -- as above
from anamorph.canary import Size, Target, take_pair  # noqa: E402 -- as above
from anamorph.canary.report import MEASURES, values  # noqa: E402 -- as above
from anamorph.canary.statistics import CONFIDENCE, Ratio  # noqa: E402 -- as above
from anamorph.canary.window import Pair  # noqa: E402 -- as above
from anamorph.checkpoint.writer import ALIGNED  # noqa: E402 -- as above
from anamorph.cli.machine.model import default_model  # noqa: E402 -- as above
from anamorph.cli.machine.signals import end_as_interrupt  # noqa: E402 -- as above
from anamorph.keys import TenantKey  # noqa: E402 -- as above
from anamorph.serve.cluster.local import start_ray, stop_ray  # noqa: E402 -- as above
from anamorph.wire.serving import APP_IMPORT_PATH, app_name, route_prefix  # noqa: E402 -- as above

LENGTHS = (16, 64, 256)
SHORT, OUTPUT = 4, 32
# Answers of each length in one round: one step decides when the first token comes, and thirty what
# a further one takes, so the first is noisier.
ROUND = (OUTPUT, SHORT, SHORT)
RESAMPLES = 2000
BUDGET = 1.02


@contextmanager
def cluster_of(folder: Path) -> Iterator[Cluster]:
    """A Ray without applications."""
    ray = start_ray(folder / "ray", num_cpus=4)
    try:
        yield Cluster(ray, Issuer())
    finally:
        stop_ray(ray)


def add(cluster: Cluster, args: dict[str, Any]) -> str:
    """Deploy one application of the torch engine; its endpoint."""
    name = app_name(args["tenant"], args["model"], args["version"])
    route = route_prefix(args["tenant"], args["model"], args["version"])
    fixed = {"engine": "torch", "dtype": "float32", "context_length": 1024, "num_blocks": 64}
    cluster.apps[name] = {
        "name": name,
        "route_prefix": route,
        "import_path": APP_IMPORT_PATH,
        "args": fixed | args,
        "deployments": [{"name": "engine", "user_config": {"jwks": cluster.jwks}}],
    }
    cluster.put()
    until(name, lambda: cluster.state(name)["status"] == "RUNNING", seconds=300)
    return cluster.ray.serve_url + route


def laid_out(base: Path, folder: Path) -> Path:
    """The base as a replica lies on disk: just written, its data beginning at a cache line.

    The engine computes on the mapped file, and there a publisher's layout makes 2 to 4 % by itself.
    """
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in base.glob("*.safetensors"):
        content = file.read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        header = content[8:begin] + b" " * (-begin % ALIGNED)
        (folder / file.name).write_bytes(len(header).to_bytes(8, "little") + header + content[begin:])
    return folder


def plaintext_args(folder: Path, version: int = 0) -> dict[str, Any]:
    """Settings of a folder with the base."""
    place = {"tenant": "plaintext", "model": "smollm2", "version": version}
    return place | {"protection": "plaintext", "replica": str(folder)}


def encrypted_args(base: Path, out: Path) -> dict[str, Any]:
    """Settings of a replica that is folded for this run."""
    key = TenantKey.generate("acme", "smollm2", 1)
    manifest = anamorph.fold(base, out, key, "rotate")
    return {
        "tenant": "acme",
        "model": "smollm2",
        "version": 1,
        "replica": str(out),
        "key_id": key.id,
        "public_key": b64encode(key.public_key()).decode(),
        "manifest_sha256": manifest.sha256(),
    }


Sides = tuple[dict[str, Any], dict[str, Any]]


def copied(sides: Sides, folder: Path, rng: np.random.Generator) -> Sides:
    """Both sides on copies of their files that are written now, in drawn order."""
    found = list(sides)
    for side in rng.permutation(2):
        copy = shutil.copytree(sides[side]["replica"], folder / f"side-{side}")
        found[side] = sides[side] | {"replica": str(copy)}
    return found[0], found[1]


Targets = tuple[Target, Target]


def targets_of(cluster: Cluster, sides: Sides, rng: np.random.Generator) -> Targets:
    """Both endpoints, deployed one after the other in drawn order; the one that is judged comes first."""
    endpoints = {int(side): add(cluster, sides[side]) for side in rng.permutation(2)}
    token = cluster.token(tenant="plaintext", model="smollm2")
    return Target(endpoints[0], token, sides[0].get("key_id")), Target(endpoints[1], token)


def pairs_of(cluster: Cluster, targets: Targets, vocab: int, limit_s: float) -> list[Pair]:
    """Pairs in whole rounds until the time is over; the first round warms up and does not count."""
    rng, found = np.random.default_rng(), list[Pair]()
    with httpx.Client(timeout=300, trust_env=False) as http:

        def one(length: int, output: int) -> Pair:
            size = Size(vocab, length, output)
            sides = take_pair(http, fresh(cluster, targets), size, rng, time.perf_counter)
            return Pair(time.monotonic(), length, *sides)

        def once() -> list[Pair]:
            return [one(length, output) for output in ROUND for length in LENGTHS]

        once()
        began = time.monotonic()
        while not found or time.monotonic() - began < limit_s:
            found += once()
    return found


def say(number: int, lives: Sequence[Sequence[Pair]]) -> None:
    """How far it is, where somebody watches: medians of the life that has ended and of all."""
    last = {name: np.median(ratios(lives[-1], name)) for name in ("ttft", "tpot")}
    all_of = {name: ratio(lives, name) for name in ("ttft", "tpot")}
    shown = ", ".join(
        f"{name} {last[name]:.4f}; of all {one.median:.4f} ({one.low:.4f} – {one.high:.4f})"
        for name, one in all_of.items()
    )
    print(f"life {len(lives)}/{number}, {len(lives[-1])} pairs: {shown}", file=sys.stderr, flush=True)


def long(pairs: Sequence[Pair]) -> list[Pair]:
    """Those with answers that are long enough for the time of a further token."""
    return [pair for pair in pairs if pair.plaintext.tokens == OUTPUT]


def fresh(cluster: Cluster, targets: Targets) -> Targets:
    """The same targets with tokens that have just been issued."""
    return tuple(  # type: ignore[return-value]
        Target(one.endpoint, cluster.token(tenant=one.endpoint.split("/")[3], model="smollm2"), one.key_id)
        for one in targets
    )


def ratios(pairs: Sequence[Pair], measure: str) -> NDArray[np.float64]:
    """Encrypted over plaintext of each pair; short answers say only when the first token came."""
    pairs = pairs if measure == "ttft" else long(pairs)
    above, below = (
        np.asarray(values(side, measure), dtype=np.float64)
        for side in ([pair.encrypted for pair in pairs], [pair.plaintext for pair in pairs])
    )
    quotients: NDArray[np.float64] = above / below
    return quotients


def ratio(lives: Sequence[Sequence[Pair]], measure: str) -> Ratio:
    """Median over all pairs, with a percentile interval over drawn lives and, in each, drawn pairs."""
    rng = np.random.default_rng(0)
    cells = [
        [ratios([pair for pair in life if pair.length == n], measure) for n in LENGTHS] for life in lives
    ]
    medians = [
        np.median([found for k in drawn for cell in cells[k] for found in rng.choice(cell, cell.size)])
        for drawn in rng.integers(0, len(cells), size=(RESAMPLES, len(cells)))
    ]
    low, high = np.quantile(medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    middle = np.median(np.concatenate([cell for life in cells for cell in life]))
    return Ratio(float(middle), float(low), float(high))


def report(lives: Sequence[Sequence[Pair]]) -> dict[str, Any]:
    """Ratios over all lives and the medians of each."""
    pairs = [pair for life in lives for pair in life]
    return {
        "lives": len(lives),
        "pairs": len(pairs),
        "long_pairs": len(long(pairs)),
        "output_tokens": [SHORT, OUTPUT],
        "ratios": {name: asdict(ratio(lives, name)) for name in MEASURES},
        "by_life": [
            {name: float(np.median(ratios(life, name))) for name in ("ttft", "tpot")} for life in lives
        ],
        "by_length": {
            n: {
                name: float(np.median(ratios([pair for pair in pairs if pair.length == n], name)))
                for name in ("ttft", "tpot")
            }
            for n in LENGTHS
        },
    }


def main() -> None:
    """Measure and print; exit 1 where an upper bound lies above the budget."""
    end_as_interrupt()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lives", type=int, default=10, help="how often both sides are started")
    parser.add_argument("--seconds", type=float, default=60, help="of pairs in each life")
    parser.add_argument("--control", action="store_true", help="the base on both sides")
    parser.add_argument("--num-gpus", type=float, default=0, help="of each side")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    base = default_model("float32", print)
    vocab = int(json.loads((base / "config.json").read_text())["vocab_size"])
    device, rng = {"num_gpus": args.num_gpus}, np.random.default_rng()
    lives: list[list[Pair]] = []
    with tempfile.TemporaryDirectory(prefix="an-") as scratch:
        folder = Path(scratch)
        plaintext = plaintext_args(laid_out(base, folder / "base"))
        judged = plaintext | {"version": 1} if args.control else encrypted_args(base, folder / "replica")
        for _ in range(args.lives):
            with tempfile.TemporaryDirectory(dir=folder) as place, cluster_of(Path(place)) as cluster:
                sides = copied((judged | device, plaintext | device), Path(place), rng)
                lives.append(pairs_of(cluster, targets_of(cluster, sides, rng), vocab, args.seconds))
            say(args.lives, lives)
    found = report(lives)
    counts = f"{found['lives']} lives, {found['pairs']} pairs, {found['long_pairs']} with {OUTPUT} tokens"
    print(f"{counts} of answer, the others {SHORT}")
    for name, one in found["ratios"].items():
        print(f"{name:<11} {one['median']:.4f}  ({one['low']:.4f} – {one['high']:.4f})")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(verdict(found["ratios"], control=args.control))


def verdict(ratios: Mapping[str, Mapping[str, float]], *, control: bool) -> bool:
    """Whether the run fails; prints why or why not."""
    judged = [ratios[name] for name in ("ttft", "tpot")]
    if control:
        unequal = not all(one["low"] <= 1 <= one["high"] for one in judged)
        found = "one does not hold 1, as by chance one run in ten" if unequal else "both intervals hold 1"
        print(f"the same on both sides: {found}")
        return unequal
    worst = max(one["high"] for one in judged)
    print(f"upper bound {worst:.4f}, budget {BUDGET}: {'within' if worst <= BUDGET else 'ABOVE'}")
    return worst > BUDGET


if __name__ == "__main__":
    main()
