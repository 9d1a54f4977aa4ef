"""What encryption costs: SmolLM2, encrypted against plaintext, on the real serving path.

    python benchmarks/overhead.py [--time 1200] [--width 0.02] [--num-gpus 0.5] [--json FILE]

Two applications of one Ray, the base and its replica, on the same engine with the same settings,
one request at a time, in pairs: independent random prompts of equal length, drawn order, lengths in
turn; short answers for the time to the first token, long ones for the time per further token, more of
whichever is less certain. Reported is the median of the pairs' ratios with its 95 % interval (paired
bootstrap, pairs drawn within each length). It stops when the intervals of TTFT and TPOT are narrower
than ``--width``, or when the time is over. ``--control`` serves the base on both sides: what is left
is the error of the method, and its interval must hold 1. ``--num-gpus`` is of each side: half a GPU puts
both on one. It takes about a minute and a half more than ``--time``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.serve.conftest import Cluster, Issuer, until  # noqa: E402 -- the checkout, not a package

import anamorph  # noqa: E402 -- as above
from anamorph.canary import Size, Target, paired_ratio, take_pair  # noqa: E402 -- as above
from anamorph.canary.report import MEASURES, values  # noqa: E402 -- as above
from anamorph.canary.statistics import Ratio  # noqa: E402 -- as above
from anamorph.canary.window import LEAST_PAIRS, Pair  # noqa: E402 -- as above
from anamorph.cli.machine.model import default_model  # noqa: E402 -- as above
from anamorph.keys import TenantKey  # noqa: E402 -- as above
from anamorph.serve.cluster.local import start_ray, stop_ray  # noqa: E402 -- as above
from anamorph.wire.serving import APP_IMPORT_PATH, app_name, route_prefix  # noqa: E402 -- as above

LENGTHS = (16, 64, 256)
SHORT, OUTPUT = 4, 32
WARMUP = 3
# Rounds of every length between two looks at the intervals.
CHECKED = 4
# Below so many pairs an interval is narrow by chance as well.
ENOUGH = 90
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


def plaintext_args(base: Path, version: int = 0) -> dict[str, Any]:
    """Settings of the base as it is."""
    place = {"tenant": "plaintext", "model": "smollm2", "version": version}
    return place | {"protection": "plaintext", "replica": str(base)}


def encrypted_args(base: Path, folder: Path) -> dict[str, Any]:
    """Settings of a replica that is folded for this run."""
    key = TenantKey.generate("acme", "smollm2", 1)
    manifest = anamorph.fold(base, folder / "replica", key, "rotate")
    return {
        "tenant": "acme",
        "model": "smollm2",
        "version": 1,
        "replica": str(folder / "replica"),
        "key_id": key.id,
        "public_key": b64encode(key.public_key()).decode(),
        "manifest_sha256": manifest.sha256(),
    }


Targets = tuple[Target, Target]


def targets_of(cluster: Cluster, base: Path, folder: Path, *, control: bool, num_gpus: float) -> Targets:
    """Both endpoints, deployed; as control, the base twice."""
    device = {"num_gpus": num_gpus}
    token = cluster.token(tenant="plaintext", model="smollm2")
    plain = Target(add(cluster, plaintext_args(base) | device), token)
    if control:
        return Target(add(cluster, plaintext_args(base, 1) | device), plain.token), plain
    args = encrypted_args(base, folder)
    token = cluster.token(tenant="acme", model="smollm2")
    return Target(add(cluster, args | device), token, args["key_id"]), plain


def pairs_until(cluster: Cluster, targets: Targets, vocab: int, limit_s: float, width: float) -> list[Pair]:
    """Pairs until the intervals are narrow or the time is over; warm-up does not count.

    One step decides when the first token comes, and thirty what a further one takes: the first
    is noisier. After the first rounds each round is of the kind, short answers or long ones,
    whose interval is wider.
    """
    rng, found, output = np.random.default_rng(), list[Pair](), OUTPUT
    with httpx.Client(timeout=300, trust_env=False) as http:

        def one(length: int) -> Pair:
            size = Size(vocab, length, output)
            sides = take_pair(http, fresh(cluster, targets), size, rng, time.perf_counter)
            return Pair(time.monotonic(), length, *sides)

        for length in LENGTHS * WARMUP:
            one(length)
        began = time.monotonic()
        for number in count(1):
            found += [one(length) for length in LENGTHS]
            over = time.monotonic() - began > limit_s
            if len(found) < LEAST_PAIRS or not (over or number % CHECKED == 0):
                continue
            ratios = {name: ratio(found, name) for name in ("ttft", "tpot")}
            say(time.monotonic() - began, found, ratios)
            widths = {name: one.high - one.low for name, one in ratios.items()}
            if over or (len(found) >= ENOUGH and max(widths.values()) <= width):
                break
            output = SHORT if widths["ttft"] > widths["tpot"] else OUTPUT
    return found


def say(seconds: float, pairs: Sequence[Pair], ratios: Mapping[str, Ratio]) -> None:
    """How far it is, where somebody watches."""
    shown = ", ".join(
        f"{name} {one.median:.4f} ({one.low:.4f} – {one.high:.4f})" for name, one in ratios.items()
    )
    print(
        f"{seconds:4.0f} s, {len(pairs)} pairs, {len(long(pairs))} long: {shown}", file=sys.stderr, flush=True
    )


def long(pairs: Sequence[Pair]) -> list[Pair]:
    """Those with answers that are long enough for the time of a further token."""
    return [pair for pair in pairs if pair.plaintext.tokens == OUTPUT]


def fresh(cluster: Cluster, targets: Targets) -> Targets:
    """The same targets with tokens that have just been issued."""
    return tuple(  # type: ignore[return-value]
        Target(one.endpoint, cluster.token(tenant=one.endpoint.split("/")[3], model="smollm2"), one.key_id)
        for one in targets
    )


def ratio(pairs: Sequence[Pair], measure: str) -> Ratio:
    """Encrypted over plaintext; short answers say only when the first token came."""
    pairs = pairs if measure == "ttft" else long(pairs)
    return paired_ratio(
        values([pair.encrypted for pair in pairs], measure),
        values([pair.plaintext for pair in pairs], measure),
        seed=0,
        strata=[pair.length for pair in pairs],
    )


def report(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Ratios over all lengths and for each."""
    by_length = {n: [pair for pair in pairs if pair.length == n] for n in LENGTHS}
    return {
        "pairs": len(pairs),
        "long_pairs": len(long(pairs)),
        "output_tokens": [SHORT, OUTPUT],
        "ratios": {name: asdict(ratio(pairs, name)) for name in MEASURES},
        "by_length": {
            n: {name: asdict(ratio(some, name)) for name in MEASURES} for n, some in by_length.items() if some
        },
    }


def main() -> None:
    """Measure and print; exit 1 where an upper bound lies above the budget."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--time", type=float, default=1200, help="seconds at most")
    parser.add_argument("--width", type=float, default=0.02, help="of the intervals that are narrow enough")
    parser.add_argument("--control", action="store_true", help="the base on both sides")
    parser.add_argument("--num-gpus", type=float, default=0, help="of each side")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    base = default_model("float32", print)
    vocab = int(json.loads((base / "config.json").read_text())["vocab_size"])
    with tempfile.TemporaryDirectory(prefix="an-") as folder, cluster_of(Path(folder)) as cluster:
        targets = targets_of(cluster, base, Path(folder), control=args.control, num_gpus=args.num_gpus)
        found = report(pairs_until(cluster, targets, vocab, args.time, args.width))
    print(f"{found['pairs']} pairs, {found['long_pairs']} with {OUTPUT} tokens of answer, the others {SHORT}")
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
