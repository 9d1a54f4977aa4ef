"""How many ids of a prompt vLLM finds in its cache under three salts in turn; run by vLLM's own Python.

    python vllm_salts.py FOLDER

Prints a JSON list: salt ``a`` for the first time, ``b``, then ``a`` again.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from anamorph.serve.engines.base import Sampling
from anamorph.serve.engines.vllm.engine import VllmEngine, load
from anamorph.wire.serving import EngineSettings

PROMPT = list(range(3, 80))
SETTINGS = EngineSettings(
    tenant="acme", model="tiny", version=1, replica="unused", context_length=128, num_blocks=32
)


async def cached(engine: VllmEngine, salt: str) -> int:
    """Of ``PROMPT``, as vLLM reports it with the answer."""
    engine._salt = salt
    found = [output async for output in engine._outputs(PROMPT, Sampling(max_tokens=2), frozenset())]
    return int(found[-1].num_cached_tokens)


async def main() -> None:
    engine = load(Path(sys.argv[1]), SETTINGS, threads=1)
    try:
        sys.stdout.write(json.dumps([await cached(engine, salt) for salt in ("a", "b", "a")]) + "\n")
    finally:
        engine.close()


if __name__ == "__main__":  # vLLM's own processes import this file again
    asyncio.run(main())
