"""What sharding costs and saves: SmolLM2's encrypted replica on one rank, on three, and on two stages;
and a random Llama with four key and value heads on one rank and on two.

    python benchmarks/sharding.py [--tokens 64] [--repeats 5] [--json FILE]

Each layout is served by Ray Serve on this machine, in float32. Reported are the time to
the first token and per further token of one stream, the resident set of each rank's
process beyond that of a rank with a toy model, and whether the decrypted greedy tokens are the
unsharded plaintext model's. On a machine whose cores all ranks share, ranks cannot make
anything faster. It fails where tokens differ or a rank holds more than it may of the whole.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import jwt
import psutil
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import anamorph
from anamorph.cli.machine.signals import end_as_interrupt
from anamorph.cli.smollm2 import fetch_smollm2
from anamorph.keys import TenantKey
from anamorph.serve.cluster.local import RayProcess, start_ray, stop_ray
from anamorph.wire import completions
from anamorph.wire.serving import APP_IMPORT_PATH

PROMPT = list(range(100, 164))
WHOLE: dict[str, int] = {}
SMOLLM2 = {"one rank": WHOLE, "tensor 3": {"tensor_parallel": 3}, "pipeline 2": {"pipeline_parallel": 2}}
RANDOM = {"one rank": WHOLE, "tensor 2": {"tensor_parallel": 2}}
# What the largest rank may hold of the whole.
SHARES = {"one rank": 1.0, "tensor 2": 0.6, "tensor 3": 0.5, "pipeline 2": 0.6}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 12}
SIZES = {"vocab_size": 16384, "hidden_size": 768, "intermediate_size": 2304, "initializer_range": 0.1}
APP, PREFIX = "acme.smol.v1", "/acme/smol/v1"


@dataclass(frozen=True)
class Row:
    """One layout; times in milliseconds, memory in MB per rank, rank 0 first."""

    model: str
    layout: str
    first_token_ms: float
    per_token_ms: float
    memory_mb: list[float]
    share: float
    tokens_equal: bool


@dataclass(frozen=True)
class Subject:
    """A model, its replica, a tiny one with its heads, what it answers in clear, and its layouts."""

    name: str
    replica: Path
    small: Path
    vocab_size: int
    truth: list[int]
    layouts: Mapping[str, Mapping[str, int]]


@dataclass
class Bench:
    """One Ray, one tenant's key, and the token that an engine accepts."""

    ray: RayProcess
    key: TenantKey
    signer: Ed25519PrivateKey

    @contextmanager
    def serving(self, replica: Path, **layout: Any) -> Iterator[str]:
        """Serve one replica; gives its endpoint."""
        raw = urlsafe_b64encode(self.signer.public_key().public_bytes_raw()).decode().rstrip("=")
        user_config = {"status": "serving", "jwks": [{"kid": "k", "x": raw}]}
        self._put([self._application(replica, layout, user_config)])
        try:
            self._until("RUNNING")
            yield self.ray.serve_url + PREFIX
        finally:
            self._put([])
            self._until("ABSENT")

    def token(self) -> str:
        now = int(time.time())
        who = {"iss": "anamorph", "aud": "inference", "tenant": "acme", "model": "smol", "sub": "client"}
        claims = {**who, "iat": now, "exp": now + 600}
        return jwt.encode(claims, self.signer, algorithm="EdDSA", headers={"kid": "k"})

    def stream(self, endpoint: str, prompt: list[int], n: int) -> tuple[list[int], list[float]]:
        """Ids of one answer, and when each came, in seconds from the request."""
        request = {"prompt": prompt, "max_tokens": n, "temperature": 0, "ignore_eos": True}
        began, ids, times = time.perf_counter(), [], []
        with httpx.Client(timeout=120) as http:
            for chunk in completions.stream(http, endpoint, request, token=self.token(), key_id=self.key.id):
                ids += [i for choice in chunk.choices for i in choice.token_ids]
                times.append(time.perf_counter() - began)
        return ids, times

    def memory_mb(self) -> list[float]:
        """Resident set of each rank's process, rank 0 first."""
        found: dict[str, list[float]] = {"0": [], "1": []}
        for pid in self.ray.pids():
            title = " ".join(psutil.Process(pid).cmdline())
            if title.startswith("ray::") and ("v1:engine" in title or "EngineRank" in title):
                found["01"["EngineRank" in title]].append(psutil.Process(pid).memory_info().rss / 1e6)
        return found["0"] + found["1"]

    def _application(self, replica: Path, layout: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
        anchor = {"key_id": self.key.id, "public_key": b64encode(self.key.public_key()).decode()}
        named = {"tenant": "acme", "model": "smol", "version": 1, "replica": str(replica), **anchor}
        sizes = {"engine": "torch", "dtype": "float32", "context_length": 512, "num_blocks": 32}
        return {
            "name": APP,
            "route_prefix": PREFIX,
            "import_path": APP_IMPORT_PATH,
            "args": {**named, **sizes, **layout},
            "deployments": [{"name": "engine", "user_config": state}],
        }

    def _put(self, applications: list[dict[str, Any]]) -> None:
        options = self.ray.http_options()
        body = {"proxy_location": "HeadOnly", "http_options": options, "applications": applications}
        httpx.put(self._api, headers=self.ray.headers(), json=body, timeout=60).raise_for_status()

    def _until(self, status: str) -> None:
        end = time.monotonic() + 180
        while (found := self._status()) != status:
            if found == "DEPLOY_FAILED" or time.monotonic() > end:
                raise SystemExit(f"the application is {found}")
            time.sleep(0.2)

    def _status(self) -> str:
        found = httpx.get(self._api, headers=self.ray.headers(), timeout=30).json()["applications"]
        return str(found.get(APP, {"status": "ABSENT"})["status"])

    @property
    def _api(self) -> str:
        return f"{self.ray.dashboard_url}/api/serve/applications/"


def toy(key: TenantKey, config: LlamaConfig, folder: Path) -> Path:
    """A replica with a model's heads that weighs nothing: what a process takes without weights."""
    heads = {name: getattr(config, name) for name in ("num_attention_heads", "num_key_value_heads")}
    sizes = {
        "vocab_size": 512,
        "hidden_size": config.hidden_size,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
    }
    LlamaForCausalLM(LlamaConfig.from_dict({**sizes, **heads})).save_pretrained(folder / "small")
    anamorph.fold(folder / "small", folder / "small-replica", key)
    return folder / "small-replica"


def measure(bench: Bench, subject: Subject, repeats: int) -> Iterator[Row]:
    """One row for each layout; the first is the whole that shares are of."""
    image = bench.key.vocab_key().permutation(subject.vocab_size).tolist()
    plain = {moved: i for i, moved in enumerate(image)}
    prompt, whole = [image[i] for i in PROMPT], 0.0
    for name, layout in subject.layouts.items():
        with bench.serving(subject.small, **layout) as endpoint:
            bench.stream(endpoint, PROMPT, 8)
            empty = bench.memory_mb()
        with bench.serving(subject.replica, **layout) as endpoint:
            runs = [bench.stream(endpoint, prompt, len(subject.truth)) for _ in range(repeats + 1)]
            memory = [held - base for held, base in zip(bench.memory_mb(), empty, strict=True)]
        whole = whole or memory[0]
        equal = all([plain[i] for i in ids] == subject.truth for ids, _ in runs)
        first = statistics.median(times[0] for _, times in runs[1:])
        rest = statistics.median((times[-1] - times[0]) / (len(times) - 1) for _, times in runs[1:])
        yield Row(subject.name, name, first * 1e3, rest * 1e3, memory, max(memory) / whole, equal)


def subjects(scratch: Path, key: TenantKey, tokens: int) -> Iterator[Subject]:
    """SmolLM2, whose heads three ranks divide, and a random Llama, whose heads two do."""
    torch.manual_seed(0)
    smollm2: Any = AutoModelForCausalLM.from_pretrained(fetch_smollm2(), dtype=torch.float32)
    drawn: Any = LlamaForCausalLM(LlamaConfig.from_dict({**HEADS, **SIZES}))
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": -1}
    for name, model, layouts in (("SmolLM2", smollm2, SMOLLM2), ("random Llama", drawn, RANDOM)):
        folder = scratch / name.replace(" ", "-")
        model.save_pretrained(folder)
        anamorph.fold(folder, folder / "replica", key)
        truth = model.generate(torch.tensor([PROMPT]), **options)[0, len(PROMPT) :].tolist()
        small = toy(key, model.config, folder)
        yield Subject(name, folder / "replica", small, model.config.vocab_size, truth, layouts)


def show(row: Row) -> None:
    """A line for people."""
    memory = " + ".join(f"{mb:.0f}" for mb in row.memory_mb)
    print(
        f"{row.model:12} {row.layout:10} first token {row.first_token_ms:6.1f} ms, "
        f"then {row.per_token_ms:6.1f} ms; weights and cache {memory} MB (largest {row.share:.2f} of the "
        f"whole, may be {SHARES[row.layout]}); tokens {'equal' if row.tokens_equal else 'DIFFERENT'}"
    )


def run(scratch: Path, tokens: int, repeats: int) -> list[Row]:
    """Fold, serve and measure every layout, and print a line for each."""
    key, rows = TenantKey.generate("acme", "smol", 1), list[Row]()
    found = list(subjects(scratch, key, tokens))
    ray = start_ray(scratch / "ray", num_cpus=8)
    try:
        bench = Bench(ray, key, Ed25519PrivateKey.generate())
        for subject in found:
            for row in measure(bench, subject, repeats):
                rows.append(row)
                show(row)
    finally:
        stop_ray(ray)
    return rows


def main() -> None:
    """Measure, print, and fail where a bound is broken."""
    end_as_interrupt()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sharding-", dir="/tmp") as scratch:
        rows = run(Path(scratch), args.tokens, args.repeats)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    bad = [f"{r.model}, {r.layout}" for r in rows if not r.tokens_equal or r.share > SHARES[r.layout]]
    if bad:
        sys.exit(f"tokens or shares are not as they must be: {'; '.join(bad)}")


if __name__ == "__main__":
    main()
