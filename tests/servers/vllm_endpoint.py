"""One endpoint of the vLLM engine without Ray; run by the Python of vLLM's own environment.

    python vllm_endpoint.py FILE

FILE is JSON: ``settings`` (EngineSettings), ``state`` (KeyState), ``port``, ``threads``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import uvicorn

from anamorph import telemetry
from anamorph.serve.api.app import build_app
from anamorph.serve.api.endpoint import Endpoint
from anamorph.serve.engines.loading import open_engine
from anamorph.wire.serving import EngineSettings, KeyState


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text())
    settings = EngineSettings.model_validate(given["settings"])
    engine = open_engine(settings, threads=given["threads"])
    observed = telemetry.build("anamorph-engine")
    endpoint = Endpoint(settings, engine, observed)
    endpoint.reconfigure(KeyState.model_validate(given["state"]))
    try:
        uvicorn.run(build_app(endpoint), host="127.0.0.1", port=given["port"], log_level="warning")
    finally:
        engine.close()
        observed.shutdown()


if __name__ == "__main__":  # vLLM's own processes import this file again
    main()
