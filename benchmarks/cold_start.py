"""How long an engine takes from nothing to its first token, phase by phase, from an object store.

    python benchmarks/cold_start.py [--rounds 5] [--json FILE]

SmolLM2's encrypted replica lies in an S3-compatible server (SeaweedFS) on this machine. Each
round starts a fresh process three times: with an empty cache (``cold``), with the replica in
the node's cache (``warm``), and with one flipped byte in it (``repaired``). A process opens the
engine as a replica does and generates one token of a prompt of 32 ids; the phases are those of
``anamorph.engine.cold_start``. Starting Python and importing torch is not among them. Files are
in the page cache in every round: a disk that has to be read first is slower.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from base64 import b64encode
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.servers.s3 import BUCKET, running_s3  # noqa: E402 -- the checkout, not a package

from anamorph.cli.machine.signals import end_as_interrupt  # noqa: E402 -- as above
from anamorph.cli.smollm2 import fetch_smollm2  # noqa: E402 -- as above
from anamorph.keys import TenantKey  # noqa: E402 -- as above
from anamorph.pipeline import fold  # noqa: E402 -- as above
from anamorph.replica import Store  # noqa: E402 -- as above
from anamorph.replica.manifest import CHUNK  # noqa: E402 -- as above

SHARD = "model.safetensors"
PROMPT = list(range(100, 132))


async def one_token(engine: Any) -> None:
    """The first token of an answer."""
    from contextlib import aclosing

    from anamorph.serve.engines.base import Sampling

    async with aclosing(engine.submit(PROMPT, Sampling(max_tokens=1, temperature=0))) as tokens:
        async for _ in tokens:
            return


def start_once(settings: str) -> dict[str, float]:
    """Open an engine as a replica process does; seconds of each phase. Runs in a process of its own."""
    import asyncio

    from anamorph.serve.engines.coldstart import ColdStart
    from anamorph.serve.engines.loading import open_engine
    from anamorph.wire.serving import EngineSettings

    start = ColdStart()
    engine = open_engine(EngineSettings.model_validate_json(settings), threads=2, start=start)
    with start.phase("first_token"):
        asyncio.run(one_token(engine))
    engine.close()
    return start.seconds


def child(settings: dict[str, Any]) -> dict[str, float]:
    """``start_once`` in a fresh process."""
    command = [sys.executable, __file__, "--child"]
    done = subprocess.run(command, input=json.dumps(settings).encode(), stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def publish(folder: Path, store: Store) -> dict[str, Any]:
    """Fold SmolLM2, publish it, and return settings that name it."""
    key = TenantKey.from_root(bytes(32), "acme", "smol", 1)
    manifest = fold(fetch_smollm2(), folder, key)
    return {
        "tenant": "acme",
        "model": "smol",
        "version": 1,
        "replica": store.publish(folder, "acme/smol/v1"),
        "key_id": key.id,
        "public_key": b64encode(key.public_key()).decode(),
        "manifest_sha256": manifest.sha256(),
        "dtype": "float32",
        "context_length": 512,
        "num_blocks": 64,
    }


def flip_one_byte(entry: Path) -> None:
    """Damage one chunk of a cached entry."""
    with (entry / SHARD).open("r+b") as file:
        file.seek(3 * CHUNK)
        byte = file.read(1)
        file.seek(3 * CHUNK)
        file.write(bytes([byte[0] ^ 1]))


def rounds(settings: dict[str, Any], cache: Path, count: int) -> dict[str, list[dict[str, float]]]:
    """Seconds of each phase of every start; the first round warms up the machine and does not count."""
    settings = {**settings, "cache": {"folder": str(cache)}}
    found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": [], "repaired": []}
    for _ in range(count + 1):
        shutil.rmtree(cache, ignore_errors=True)
        found["cold"].append(child(settings))
        found["warm"].append(child(settings))
        flip_one_byte(cache / "entries" / settings["manifest_sha256"])
        found["repaired"].append(child(settings))
    return {name: starts[1:] for name, starts in found.items()}


def median(starts: list[dict[str, float]]) -> dict[str, float]:
    """Median of each phase, and of the whole."""
    phases = {name: [one.get(name, 0.0) for one in starts] for name in starts[0]}
    phases["total"] = [sum(one.values()) for one in starts]
    return {name: round(statistics.median(values), 3) for name, values in phases.items()}


def main() -> None:
    """Fold, publish, start again and again, print medians in seconds."""
    end_as_interrupt()
    parser = argparse.ArgumentParser(description="Time the phases of an engine's cold start.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(start_once(sys.stdin.read())))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "weed").mkdir()
        with running_s3(folder / "weed") as server:
            os.environ.update(server.environment)
            settings = publish(folder / "replica", Store(f"s3://{BUCKET}/bench"))
            size = sum(path.stat().st_size for path in (folder / "replica").iterdir())
            found = rounds(settings, folder / "cache", options.rounds)
    result = {"replica_bytes": size, "rounds": options.rounds} | {
        name: median(starts) for name, starts in found.items()
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
