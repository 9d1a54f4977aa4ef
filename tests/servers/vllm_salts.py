"""How many ids of a prompt vLLM finds in its cache for tenants in turn; run by vLLM's own Python.

    python vllm_salts.py FOLDER

Prints a JSON list: ``acme`` for the first time, ``globex``, then ``acme`` again. Both are engines of
their own settings over one running vLLM.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from anamorph.serve.engines.base import Sampling
from anamorph.serve.engines.vllm.engine import VllmEngine, engine_of, load
from anamorph.wire.serving import EngineSettings

PROMPT = list(range(3, 80))


def settings(tenant: str) -> EngineSettings:
    return EngineSettings(
        tenant=tenant,
        model="tiny",
        version=1,
        replica="unused",
        key_id=f"{tenant}.tiny.v1.0123456789abcdef",
        context_length=128,
        num_blocks=32,
    )


async def cached(engine: VllmEngine) -> int:
    """Of ``PROMPT``, as vLLM reports it with the answer."""
    found = [output async for output in engine._outputs(PROMPT, Sampling(max_tokens=2), frozenset())]
    return int(found[-1].num_cached_tokens)


async def main() -> None:
    folder = Path(sys.argv[1])
    acme = load(folder, settings("acme"), threads=1)
    globex = engine_of(acme._engine, folder, settings("globex"))
    try:
        sys.stdout.write(json.dumps([await cached(engine) for engine in (acme, globex, acme)]) + "\n")
    finally:
        acme.close()


if __name__ == "__main__":  # vLLM's own processes import this file again
    asyncio.run(main())
