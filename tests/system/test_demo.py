"""`anamorph demo` as a user runs it: with the real model, whole, and cut off."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(1800)]
# Anything that the demo starts inherits this; Ray's processes keep only what is allowed to them.
TRACE = "OTEL_ANAMORPH_TEST"


def command(reports: Path) -> list[str]:
    return [sys.executable, "-m", "anamorph.cli", "demo", "--pairs", "2", "--reports", str(reports)]


def left_over(trace: str) -> list[str]:
    """Command lines of processes that still carry the trace."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(TRACE) == trace and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def test_the_demo_shows_six_points_and_leaves_nothing(tmp_path: Path) -> None:
    """Every claim holds, the reports are written, no process and no home folder stays."""
    trace, temporary = secrets.token_hex(8), Path(tempfile.gettempdir())
    before = set(temporary.glob("anamorph-*"))
    done = subprocess.run(
        command(tmp_path), env=os.environ | {TRACE: trace}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [f"\n{number}. " in done.stdout for number in range(1, 7)] == [True] * 6
    assert "✗" not in done.stdout
    assert "processes left: 0" in done.stdout
    assert json.loads((tmp_path / "overhead.json").read_text())["pairs"] == 2
    assert (tmp_path / "overhead.png").read_bytes().startswith(b"\x89PNG")
    assert left_over(trace) == []
    assert {path.name for path in set(temporary.glob("anamorph-demo-*")) - before} == set()


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("starting the key service", signal.SIGINT),
        ("making, deploying", signal.SIGTERM),
        ("fold", signal.SIGKILL),
        ("key is rotated while", signal.SIGINT),
    ],
)
def test_a_demo_that_is_cut_off_leaves_nothing(tmp_path: Path, line: str, number: signal.Signals) -> None:
    """Ctrl-C, a polite and an impolite kill, at different moments: every process ends."""
    trace = secrets.token_hex(8)
    with subprocess.Popen(
        command(tmp_path),
        env=os.environ | {TRACE: trace, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as demo:
        assert demo.stdout is not None
        assert any(line in seen for seen in demo.stdout)
        demo.send_signal(number)
        # Whoever is left holds the pipe: reading to its end waits for all of them.
        demo.stdout.read()
    assert demo.returncode == (-signal.SIGKILL if number is signal.SIGKILL else 130)
    assert left_over(trace) == []
