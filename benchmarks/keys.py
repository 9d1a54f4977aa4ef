"""How long the draws of a key take: ``python benchmarks/keys.py [--json FILE]``.

Each draw is made from a fresh stream, as in use; the median of the runs counts.
The target is a vocabulary permutation of 128,256 in under 100 ms.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from anamorph.keys import Stream, TenantKey

TARGET_MS = 100.0


def median_ms(call: Callable[[], object], runs: int) -> float:
    """Median wall-clock time of ``call`` in milliseconds, after one call that does not count."""
    call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def cases(key: TenantKey) -> dict[str, Callable[[], object]]:
    """What is measured, by the name it is reported under."""
    vocab, residual = key.subkey("vocab"), key.subkey("residual")
    return {
        "subkey": lambda: key.subkey("vocab"),
        "permutation 49,152": lambda: Stream(vocab).permutation(49_152),
        "permutation 128,256": lambda: Stream(vocab).permutation(128_256),
        "permutation 262,144": lambda: Stream(vocab).permutation(262_144),
        "normals 1,000,000": lambda: Stream(residual).normals(1_000_000),
        "orthogonal 576": lambda: Stream(residual).orthogonal(576),
        "orthogonal 2,048": lambda: Stream(residual).orthogonal(2_048),
    }


def main() -> None:
    """Measure, print a table, and write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the medians in milliseconds here")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    key = TenantKey.from_root(bytes(32), "bench", "m", 1)
    medians = {name: median_ms(call, arguments.runs) for name, call in cases(key).items()}
    for name, value in medians.items():
        print(f"{name:>22}  {value:10.3f} ms")
    met = medians["permutation 128,256"] < TARGET_MS
    print(f"permutation of 128,256 in under {TARGET_MS:.0f} ms: {'yes' if met else 'NO'}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"unit": "ms", "median": medians}, indent=2) + "\n")


if __name__ == "__main__":
    main()
