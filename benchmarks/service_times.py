"""Service times of a model on this machine's device, for ``simulate.py``; or of a device by its data sheet.

    python benchmarks/service_times.py [--model FOLDER] [--device cpu|cuda] [--json FILE]
    python benchmarks/service_times.py --data-sheet h100 --json FILE

Measured: a prompt's time per token, a decoding step by batch, a replica of equal shapes copied into
the module's tensors (a swap), the folder read into memory, and a process until it could load. Median
of several; the model is SmolLM2 unless another folder is named. What needs a store is computed from a rate.
The second form computes the same from bytes, operations and rates, with the efficiencies named in
the file: it is what stands where no such device is at hand, and it is no measurement.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

BATCHES = (1, 2, 4, 8, 16)
PROMPT, CONTEXT = 512, 256
REPEATS = 5
# A measurement takes no new repeat after so long: on a slow device few have to do.
ENOUGH_S = 20.0
STORE_BYTES_PER_S = 1.25e9
COMMAND = "python benchmarks/service_times.py"

# NVIDIA H100 SXM by its data sheet, and what engines commonly reach of it.
H100 = {
    "memory_bytes": 80e9,
    "memory_bytes_per_s": 3.35e12,
    "operations_per_s": 989e12,
    "link_bytes_per_s": 64e9,
    "memory_efficiency": 0.7,
    "operations_efficiency": 0.45,
    "link_efficiency": 0.8,
    "disk_bytes_per_s": 6e9,
    "host_bytes": 256e9,
    "process_bytes": 2e9,
    "start_s": 20.0,
    "step_overhead_s": 0.5e-3,
}
# Parameters, bytes of cache per token, share of the tenants; shapes as of common open models.
BASES = (("1b", 1.24e9, 32_768, 0.5), ("8b", 8.03e9, 131_072, 0.4), ("14b", 14.8e9, 196_608, 0.1))
CACHE_TOKENS = 32_768


def median_of(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Seconds of one call, after one that is not counted; fewer than ``repeats`` where they take long."""
    start = time.perf_counter()
    work()
    taken: list[float] = []
    while len(taken) < repeats and not (taken and time.perf_counter() - start > ENOUGH_S):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


class Measured:
    """A model on a device, and its times."""

    def __init__(self, folder: Path, device: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch, self.folder, self.device = torch, folder, device
        # As the engines compute: a CPU without matrix units for bfloat16 takes many times as long in it.
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model = loaded.to(device).eval()
        self.weights = list(self.model.parameters())
        self.weight_bytes = sum(w.numel() * w.element_size() for w in self.weights)

    def synchronised(self, work: Callable[[], object]) -> Callable[[], None]:
        """``work``, and the wait until the device has done it."""

        def run() -> None:
            with self.torch.inference_mode():
                work()
            if self.device != "cpu":
                self.torch.cuda.synchronize()

        return run

    def prefill_s(self) -> float:
        """Seconds per token of a prompt."""
        ids = self._ids(1, PROMPT)
        return median_of(self.synchronised(lambda: self.model(ids, logits_to_keep=1))) / PROMPT

    def step_s(self, batch: int) -> float:
        """Seconds of one step of so many sequences, each with a context of 256 tokens."""
        with self.torch.inference_mode():
            cache = self.model(self._ids(batch, CONTEXT), use_cache=True).past_key_values
        ids = self._ids(batch, 1)

        def step() -> None:
            self.model(ids, past_key_values=cache, use_cache=True)
            cache.crop(-1)  # as before the step

        return median_of(self.synchronised(step), 3 * REPEATS)

    def swap_s(self) -> float:
        """Seconds to copy another replica from host memory, pinned for a GPU, into the module."""
        pin = self.device != "cpu"
        other = [self.torch.empty(w.shape, dtype=w.dtype, pin_memory=pin).copy_(w) for w in self.weights]

        def swap() -> None:
            for mine, its in zip(self.weights, other, strict=True):
                mine.copy_(its, non_blocking=True)

        return median_of(self.synchronised(swap))

    def read_s(self) -> float:
        """Seconds to read the folder's weights into host memory, from the page cache at best."""
        from safetensors.torch import load_file

        shards = sorted(self.folder.glob("*.safetensors"))
        return median_of(lambda: [t.clone() for shard in shards for t in load_file(shard).values()], 3)

    def start_s(self) -> float:
        """Seconds of a process until it has imported what an engine needs."""
        command = [sys.executable, "-c", "import torch, transformers.generation, ray.serve"]
        return median_of(lambda: subprocess.run(command, check=True), 2)

    def _ids(self, batch: int, length: int) -> Any:
        return self.torch.randint(0, self.model.config.vocab_size, (batch, length), device=self.device)


def measure(folder: Path, device: str) -> dict[str, Any]:
    """The inputs of a simulation whose devices are each as this machine."""
    import psutil

    found = Measured(folder, device)
    memory = psutil.virtual_memory().total
    service = {
        "name": folder.name,
        "share": 1.0,
        "weight_bytes": found.weight_bytes,
        "cache_bytes": found.weight_bytes / 4,
        "prefill_s": told("prefill_s", found.prefill_s),
        "steps": [[batch, told(f"step_s of {batch}", partial(found.step_s, batch))] for batch in BATCHES],
        "swap_s": told("swap_s", found.swap_s),
        "read_s": told("read_s", found.read_s),
        "fetch_s": found.weight_bytes / STORE_BYTES_PER_S,
        "start_s": told("start_s", found.start_s),
        "max_concurrent": BATCHES[-1],
    }
    measured = f"{COMMAND} --device {device}"
    source = dict.fromkeys(("weight_bytes", "prefill_s", "steps", "swap_s", "read_s", "start_s"), measured)
    source |= {
        "fetch_s": f"weight_bytes at {STORE_BYTES_PER_S:.3g} B/s: an assumed network of 10 Gbit/s",
        "memory_bytes, host_bytes": "half of this machine's memory each, as slots and as host memory",
        "cache_bytes": "assumed: a quarter of the weights",
        "process_bytes": "assumed: resident size of an engine's process without its model",
    }
    size = {"memory_bytes": memory / 2, "host_bytes": memory / 2, "process_bytes": 0.6e9}
    return {"device": {"name": _name(device)} | size, "services": [service], "source": source}


def told(name: str, work: Callable[[], float]) -> float:
    """A figure, printed as soon as it is there: what has been measured is not lost with what follows."""
    began, value = time.perf_counter(), work()
    print(
        f"{name} {value:.6f} (measured in {time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True
    )
    return value


def _name(device: str) -> str:
    if device == "cpu":
        return "two cores of this machine"
    import torch

    return str(torch.cuda.get_device_name())


def data_sheet(sheet: dict[str, float]) -> dict[str, Any]:
    """The inputs computed from bytes, operations and rates."""
    bandwidth = sheet["memory_bytes_per_s"] * sheet["memory_efficiency"]
    operations = sheet["operations_per_s"] * sheet["operations_efficiency"]
    link = sheet["link_bytes_per_s"] * sheet["link_efficiency"]

    def service(name: str, parameters: float, cache_per_token: float, share: float) -> dict[str, Any]:
        size = 2 * parameters
        # A step reads all weights once, and each sequence's cache, here of 512 tokens.
        steps = [
            [batch, sheet["step_overhead_s"] + (size + batch * 512 * cache_per_token) / bandwidth]
            for batch in (1, 8, 16, 64, 256)
        ]
        return {
            "name": name,
            "share": share,
            "weight_bytes": size,
            "cache_bytes": CACHE_TOKENS * cache_per_token,
            "prefill_s": 2 * parameters / operations,
            "steps": steps,
            "swap_s": size / link,
            "read_s": size / sheet["disk_bytes_per_s"],
            "fetch_s": size / STORE_BYTES_PER_S,
            "start_s": sheet["start_s"],
            "max_concurrent": 64,
        }

    device = {key: sheet[key] for key in ("memory_bytes", "host_bytes", "process_bytes")}
    computed = f"NOT measured: {COMMAND} --data-sheet h100, from {json.dumps(sheet)}"
    source = {
        "all": computed,
        "steps": "weights and 512 tokens of cache per sequence, read once",
        "cache_bytes": f"assumed: room for {CACHE_TOKENS} tokens per replica",
        "start_s, disk_bytes_per_s, host_bytes": "assumed",
    }
    named = {"name": "H100 80 GB (data sheet)"} | device
    return {"device": named, "services": [service(*base) for base in BASES], "source": source}


def main() -> None:
    """Measure or compute, print, write."""
    parser = argparse.ArgumentParser(description="Service times of a model, for the simulation.")
    parser.add_argument("--model", type=Path, help="a model folder; SmolLM2 by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--data-sheet", choices=("h100",))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.data_sheet:
        found = data_sheet(H100)
    else:
        from anamorph.cli.machine.model import default_model

        # Stored as it is computed.
        own = options.model or default_model("float32" if options.device == "cpu" else "auto", print)
        found = measure(own, options.device)
    text = json.dumps(found, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
