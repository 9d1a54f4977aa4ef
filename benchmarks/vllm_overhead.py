"""What encryption costs on the vLLM engine: SmolLM2 encrypted against plaintext, in pairs.

    make bench-vllm [ARGS="--pairs 60 --prompt-tokens 128 --output-tokens 32 --num-gpus 0.5 --json FILE"]

Two endpoints of the vLLM engine run side by side, in vLLM's own environment, and differ in
nothing but their weights. The canary measures them: independent random ids, one request at a
time, order drawn per pair; ratios are medians of the pairs' with a 95 % bootstrap interval. On a GPU each
side has ``--num-gpus`` of it, and ``ANAMORPH_VLLM_PYTHON`` names the Python of a CUDA build of vLLM.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import Progress

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.serve.conftest import Issuer  # noqa: E402 -- the checkout, not a package
from tests.servers.vllm_process import PYTHON, VllmProcess, endpoint  # noqa: E402 -- as above

import anamorph  # noqa: E402 -- as above
from anamorph.canary import OverheadReport, Target, measure  # noqa: E402 -- as above
from anamorph.cli.machine.model import default_model  # noqa: E402 -- as above
from anamorph.cli.machine.signals import end_as_interrupt  # noqa: E402 -- as above
from anamorph.keys import TenantKey  # noqa: E402 -- as above

VOCAB = 49152


def settings(options: argparse.Namespace, **fields: Any) -> dict[str, Any]:
    """``EngineSettings`` that both sides share, and what tells them apart."""
    common = {"model": "smol", "engine": "vllm", "context_length": 1024, "num_blocks": 128}
    return {**common, "dtype": options.dtype, "num_gpus": options.num_gpus, **fields}


def encrypted(base: Path, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Fold the base under a fresh key."""
    key = TenantKey.generate("acme", "smol", 1)
    manifest = anamorph.fold(base, scratch / "replica", key)
    return settings(
        options,
        tenant="acme",
        version=1,
        replica=str(scratch / "replica"),
        key_id=key.id,
        public_key=b64encode(key.public_key()).decode(),
        manifest_sha256=manifest.sha256(),
    )


def plaintext(base: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The baseline."""
    return settings(options, tenant="plaintext", version=0, replica=str(base), protection="plaintext")


@contextmanager
def served(chosen: dict[str, Any], scratch: Path, issuer: Issuer) -> Iterator[tuple[VllmProcess, Target]]:
    """One endpoint in a process of its own."""
    folder = scratch / str(chosen["tenant"])
    folder.mkdir()
    server = endpoint(folder, chosen, [key.model_dump() for key in issuer.jwks])
    claims = {"tenant": chosen["tenant"], "exp": int(time.time()) + 890}  # at most 15 minutes
    try:
        yield server, Target(server.url, issuer.token(time.time(), **claims), chosen.get("key_id"))
    finally:
        server.stop()


def run(options: argparse.Namespace, scratch: Path, say: Console) -> OverheadReport:
    """Fold, start both, measure."""
    issuer = Issuer()
    base = default_model(options.dtype, say.print)
    hidden = encrypted(base, options, scratch)
    say.print("starting two vLLM engines")
    with (
        served(hidden, scratch, issuer) as (_, ours),
        served(plaintext(base, options), scratch, issuer) as (_, plain),
        httpx.Client(timeout=120, trust_env=False) as http,
        Progress(console=say) as bar,
    ):
        pairs = bar.add_task("pairs", total=None)
        return measure(
            ours,
            plain,
            model="SmolLM2-135M-Instruct on vLLM",
            vocab_size=VOCAB,
            http=http,
            pairs=options.pairs,
            prompt_tokens=options.prompt_tokens,
            output_tokens=options.output_tokens,
            progress=lambda done, of: bar.update(pairs, completed=done, total=of),
        )


def main() -> None:
    """Measure, print, and write the JSON if asked to."""
    end_as_interrupt()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--num-gpus", type=float, default=0, help="of each side")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    say = Console()
    if PYTHON not in os.environ:
        say.print(
            f"skipped: vLLM has an environment of its own; make bench-vllm, or name its Python in {PYTHON}"
        )
        return
    with tempfile.TemporaryDirectory() as scratch:
        report = run(options, Path(scratch), say)
    say.print(report.table())
    if options.json:
        options.json.write_text(report.to_json())


if __name__ == "__main__":
    main()
