"""How much memory a fold takes: a synthetic checkpoint, folded by a process of its own.

    python benchmarks/memory.py [--gigabytes 4] [--scratch FOLDER] [--json FILE]

The checkpoint is a bfloat16 Llama of random weights, 2048 wide, with as many layers as
fill the size asked for. What is reported is the largest resident set of the folding
process as the kernel counts it, libraries and mapped pages of the base included.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from anamorph.checkpoint.writer import ShardWriter, lay_out, nbytes, write_index, write_json
from anamorph.models import table_for
from anamorph.plan import Step

LIMIT_MB = 1500
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}

FOLD = """
import sys
from pathlib import Path
from anamorph.checkpoint import fold
from anamorph.keys import TenantKey
fold(Path(sys.argv[1]), Path(sys.argv[2]), TenantKey.from_root(bytes(32), "bench", "memory", 1))
"""


def steps(layers: int) -> list[Step]:
    """Every tensor of the synthetic model."""
    table = table_for(CONFIG | {"num_hidden_layers": layers})
    return [
        Step(name, name, tensor.axes, tuple(map(table.length, tensor.axes)), "BF16")
        for name, tensor in table.tensors.items()
    ]


def synthesise(folder: Path, size: int) -> int:
    """Write a checkpoint of at least ``size`` bytes, and return how many it has."""
    one, two = (sum(map(nbytes, steps(layers))) for layers in (1, 2))
    layers = 1 + max(0, math.ceil((size - one) / (two - one)))
    folder.mkdir()
    write_json(folder / "config.json", CONFIG | {"num_hidden_layers": layers})
    shards = lay_out(steps(layers), 2**30)
    noise = (torch.randn(2**24) * 0.02).bfloat16()
    for shard in shards:
        with ShardWriter(folder, shard) as writer:
            for step in shard.steps:
                _write_noise(writer, noise, nbytes(step) // noise.itemsize)
    write_index(folder, shards)
    return sum(shard.size for shard in shards)


def _write_noise(writer: ShardWriter, noise: torch.Tensor, count: int) -> None:
    for start in range(0, count, len(noise)):
        writer.write(noise[: min(len(noise), count - start)])


def measure(gigabytes: float, scratch: Path) -> dict[str, object]:
    """Synthesise, fold in a child process, and ask the kernel for the child's peak."""
    size = synthesise(scratch / "base", int(gigabytes * 1e9))
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", FOLD, scratch / "base", scratch / "replica"], check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000
    return {
        "base_gb": round(size / 1e9, 2),
        "peak_rss_mb": round(peak),
        "limit_mb": LIMIT_MB,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="Measure the peak memory of a fold.")
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        result = measure(options.gigabytes, Path(scratch))
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
