"""The command line in a process of its own, as users run it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def anamorph() -> Run:
    """Run ``python -m anamorph.cli`` with these arguments; give back exit code and both outputs."""

    def run(*args: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "anamorph.cli", *map(str, args)],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"NO_COLOR": "1", "COLUMNS": "120", "OMP_NUM_THREADS": "1"},
        )

    return run
