"""How long a fold takes, against the least that any fold must do.

    python benchmarks/fold.py [--base FOLDER] [--rounds 9] [--threads 2] [--device cpu] [--json FILE]

The reference reads the same files with stock safetensors, multiplies the same matrices
with torch.matmul in the same type, and writes the results with stock safetensors. It
folds no gains, permutes nothing, hashes nothing, flushes nothing to disk and publishes
nothing. The two run in turn, each round in the other order, and the ratio of each pair
is what is reported, with a bootstrap confidence interval of the median.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from anamorph.checkpoint import Checkpoint, fold
from anamorph.checkpoint.writer import DTYPES
from anamorph.cli.smollm2 import fetch_smollm2
from anamorph.keys import TenantKey
from anamorph.plan import Step, TransformPlan, build_plan
from anamorph.plan.symmetry import Blocks, Chain, Dense, Symmetry

LIMIT = 1.5


def products(symmetry: Symmetry) -> list[Symmetry]:
    """The factors of a symmetry that are matrix products."""
    factors = symmetry.steps if isinstance(symmetry, Chain) else (symmetry,)
    return [factor for factor in factors if isinstance(factor, Dense | Blocks)]


class Reference:
    """Read, multiply, write: prepared outside of what is timed, key and symmetries included."""

    def __init__(self, base: Path, plan: TransformPlan, device: str) -> None:
        self.base, self.plan, self.device = Checkpoint.open(base), plan, device
        lifted: dict[int, Symmetry] = {}
        self.matrices = {
            step.name: [
                [self._lift(one, step, lifted) for one in products(plan.action(axis))] for axis in step.axes
            ]
            for step in plan.steps
            if step.fill is None
        }

    def _lift(self, symmetry: Symmetry, step: Step, lifted: dict[int, Symmetry]) -> Symmetry:
        dtype = torch.float32 if DTYPES[step.dtype].itemsize == 2 else torch.float64
        if id(symmetry) not in lifted:
            lifted[id(symmetry)] = symmetry.lifted(lambda a: torch.from_numpy(a).to(self.device, dtype))
        return lifted[id(symmetry)]

    def run(self, out: Path) -> None:
        """One pass over the model."""
        out.mkdir()
        written: dict[str, torch.Tensor] = {}
        for step in self.plan.steps:
            written[step.name] = self._made(step)
        save_file(written, out / "model.safetensors", metadata={"format": "pt"})

    def _made(self, step: Step) -> torch.Tensor:
        stored = DTYPES[step.dtype]
        if step.fill is not None:
            return torch.full(step.shape, step.fill, dtype=stored)
        with safe_open(self.base.folder / self.base.shard_of[step.source], framework="pt") as shard:
            array: torch.Tensor = shard.get_tensor(step.source)
        array = array.to(self.device, torch.float32 if stored.itemsize == 2 else torch.float64)
        for dim, factors in enumerate(self.matrices[step.name]):
            for factor in factors:
                array = factor.act(array, dim)
        return array.to("cpu", stored).contiguous()


def seconds(run: Callable[[Path], object], scratch: Path) -> tuple[float, float]:
    """Wall time and processor time of one run into a fresh folder, which is removed again."""
    out = scratch / "out"
    start, busy = time.perf_counter(), time.process_time()
    run(out)
    taken = time.perf_counter() - start, time.process_time() - busy
    shutil.rmtree(out)
    return taken


def interval(ratios: Sequence[float], draws: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap confidence interval of the median."""
    source = random.Random(0)  # noqa: S311 (resampling, not secrecy)
    medians = sorted(statistics.median(source.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def measure(base: Path, profile: str, rounds: int, device: str, scratch: Path) -> dict[str, object]:
    """Run both in turn; the first pair warms up and does not count."""
    key = TenantKey.from_root(bytes(32), "bench", "fold", 1)
    checkpoint = Checkpoint.open(base)
    plan = build_plan(checkpoint.config, checkpoint.tensors, key, profile)  # type: ignore[arg-type]
    reference = Reference(base, plan, device).run
    runs: dict[str, Callable[[Path], object]] = {
        "fold": lambda out: fold(base, out, key, profile, device=device),  # type: ignore[arg-type]
        "reference": reference,
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in sorted(runs, reverse=bool(number % 2)):
            times[name].append(seconds(runs[name], scratch))
    return {"profile": profile, "rounds": rounds, "limit": LIMIT} | report(
        times["fold"][1:], times["reference"][1:]
    )


def report(ours: Sequence[tuple[float, float]], theirs: Sequence[tuple[float, float]]) -> dict[str, object]:
    """Medians, and the median ratio of the pairs: of wall time, and of processor time for busy machines."""
    wall = [one[0] / other[0] for one, other in zip(ours, theirs, strict=True)]
    busy = [one[1] / other[1] for one, other in zip(ours, theirs, strict=True)]
    return {
        "fold_s": round(statistics.median(one[0] for one in ours), 3),
        "reference_s": round(statistics.median(one[0] for one in theirs), 3),
        "ratio": round(statistics.median(wall), 3),
        "ratio_95": [round(limit, 3) for limit in interval(wall)],
        "cpu_ratio": round(statistics.median(busy), 3),
        "cpu_ratio_95": [round(limit, 3) for limit in interval(busy)],
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="Time a fold against reading, multiplying and writing.")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = options.base or fetch_smollm2()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(base, "rotate", options.rounds, options.device, Path(scratch))
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
