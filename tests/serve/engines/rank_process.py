"""A rank that is a plain process, without Ray: ``python -m tests.serve.engines.rank_process JSON``."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from anamorph.serve.engines.ranks.process import Meeting, Part, resident_bytes
from anamorph.wire.serving import EngineSettings


def main() -> None:
    """Load one part, print how many bytes it holds, and take part until rank 0 stops."""
    given = json.loads(sys.argv[1])
    settings = EngineSettings.model_validate(given["settings"])
    meeting = Meeting(**given["meeting"])
    part = Part(settings, Path(settings.replica), given["rank"], meeting.ranks)
    part.load(meeting, meeting.address)
    if given["hangs"]:
        # After the others' word to compute, and before anything of theirs is taken.
        part.model.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGSTOP))
    print(resident_bytes(part.model), flush=True)  # noqa: T201 - read by the test
    part.follow()


if __name__ == "__main__":
    main()
