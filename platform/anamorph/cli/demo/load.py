"""Start an engine on the settings in standard input, as a replica process does; exit 3 if it is refused."""

from __future__ import annotations

import sys

from anamorph.errors import ReplicaRefused
from anamorph.serve.engines.loading import open_engine
from anamorph.wire.serving import EngineSettings


def main() -> None:
    """Load, say so, end."""
    settings = EngineSettings.model_validate_json(sys.stdin.read())
    try:
        engine = open_engine(settings, threads=1)
    except ReplicaRefused as error:
        print(error)
        raise SystemExit(3) from None
    engine.close()


if __name__ == "__main__":
    main()
