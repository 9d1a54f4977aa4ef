"""What encryption costs: SmolLM2, encrypted against plaintext, on the real serving path.

    python benchmarks/overhead.py [--time 1200] [--width 0.02] [--json FILE]

Two applications of one Ray, the base and its replica, on the same engine with the same settings,
one request at a time, in pairs: independent random prompts of equal length, drawn order, lengths in
turn. Reported is the median of the pairs' ratios with its 95 % interval (paired bootstrap, pairs drawn
within each length). It stops when the intervals of TTFT and TPOT are narrower than ``--width``,
or when the time is over. ``--control`` serves the base on both sides: what is left is the error of
the method, and its interval must hold 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import cycle
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
OUTPUT = 32
WARMUP = 3
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


def targets_of(cluster: Cluster, base: Path, folder: Path, *, control: bool) -> Targets:
    """Both endpoints, deployed; as control, the base twice."""
    plain = Target(add(cluster, plaintext_args(base)), cluster.token(tenant="plaintext", model="smollm2"))
    if control:
        return Target(add(cluster, plaintext_args(base, 1)), plain.token), plain
    args = encrypted_args(base, folder)
    token = cluster.token(tenant="acme", model="smollm2")
    return Target(add(cluster, args), token, args["key_id"]), plain


def pairs_until(cluster: Cluster, targets: Targets, vocab: int, limit_s: float, width: float) -> list[Pair]:
    """Pairs until the intervals are narrow or the time is over; warm-up does not count."""
    rng, found, began = np.random.default_rng(), list[Pair](), 0.0
    with httpx.Client(timeout=300, trust_env=False) as http:
        for number, length in enumerate(cycle(LENGTHS)):
            size = Size(vocab, length, OUTPUT)
            sides = take_pair(http, fresh(cluster, targets), size, rng, time.perf_counter)
            if number < WARMUP * len(LENGTHS):
                began = time.monotonic()
                continue
            found.append(Pair(time.monotonic(), length, *sides))
            over = time.monotonic() - began > limit_s and len(found) >= LEAST_PAIRS
            if over or (len(found) % 30 == 0 and narrow(found, width)):
                return found
    raise AssertionError("unreachable")


def fresh(cluster: Cluster, targets: Targets) -> Targets:
    """The same targets with tokens that have just been issued."""
    return tuple(  # type: ignore[return-value]
        Target(one.endpoint, cluster.token(tenant=one.endpoint.split("/")[3], model="smollm2"), one.key_id)
        for one in targets
    )


def ratio(pairs: Sequence[Pair], measure: str) -> Ratio:
    """Encrypted over plaintext."""
    return paired_ratio(
        values([pair.encrypted for pair in pairs], measure),
        values([pair.plaintext for pair in pairs], measure),
        seed=0,
        strata=[pair.length for pair in pairs],
    )


def narrow(pairs: Sequence[Pair], width: float) -> bool:
    """Whether the intervals of TTFT and TPOT are narrower than ``width``."""
    return all((one := ratio(pairs, name)).high - one.low <= width for name in ("ttft", "tpot"))


def report(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Ratios over all lengths and for each."""
    by_length = {n: [pair for pair in pairs if pair.length == n] for n in LENGTHS}
    return {
        "pairs": len(pairs),
        "output_tokens": OUTPUT,
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
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    base = default_model("float32", print)
    vocab = int(json.loads((base / "config.json").read_text())["vocab_size"])
    with tempfile.TemporaryDirectory(prefix="an-") as folder, cluster_of(Path(folder)) as cluster:
        targets = targets_of(cluster, base, Path(folder), control=args.control)
        found = report(pairs_until(cluster, targets, vocab, args.time, args.width))
    print(f"{found['pairs']} pairs, {OUTPUT} tokens of answer, prompts of {', '.join(map(str, LENGTHS))} ids")
    for name, one in found["ratios"].items():
        print(f"{name:<11} {one['median']:.4f}  ({one['low']:.4f} – {one['high']:.4f})")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    worst = max(found["ratios"][name]["high"] for name in ("ttft", "tpot"))
    print(f"upper bound {worst:.4f}, budget {BUDGET}: {'within' if worst <= BUDGET else 'ABOVE'}")
    sys.exit(worst > BUDGET)


if __name__ == "__main__":
    main()
