"""Jobs as real processes: their order, their end, and nothing left of them."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from anamorph_operator.processes import Processes
from anamorph_operator.state import Job, Ref

REF = Ref("acme", "smol", 1)
MakeJobs = Callable[[str], Processes]


@pytest.fixture
async def jobs() -> AsyncIterator[MakeJobs]:
    """Jobs that run a piece of Python; they are closed at the end."""
    made: list[Processes] = []

    def make(code: str) -> Processes:
        made.append(Processes([sys.executable, "-c", code], lambda: datetime.now(UTC)))
        return made[-1]

    yield make
    for one in made:
        await one.close()


async def ended(jobs: Processes) -> Job:
    while jobs.observe()[REF].running:  # noqa: ASYNC110 - a process ends without an event
        await asyncio.sleep(0.02)
    return jobs.observe()[REF]


async def test_the_order_comes_on_standard_input_only(jobs: MakeJobs, tmp_path: Path) -> None:
    """A job reads its whole order from standard input; its command line does not hold it."""
    out = tmp_path / "order"
    code = f"import sys, pathlib; pathlib.Path({str(out)!r}).write_text(sys.stdin.read() + str(sys.argv))"
    made = jobs(code)
    await made.start(REF, {"grant": "secret"})
    assert (await ended(made)).exit_code == 0
    order, _, argv = out.read_text().partition("[")
    assert json.loads(order) == {"grant": "secret"}
    assert "secret" not in argv


async def test_exit_status_and_attempts_are_counted(jobs: MakeJobs) -> None:
    """Two failures are two attempts, the last with its exit status and time."""
    made = jobs("raise SystemExit(7)")
    for attempt in (1, 2):
        await made.start(REF, {})
        job = await ended(made)
        assert (job.attempts, job.exit_code) == (attempt, 7)
        assert job.ended_at is not None


async def test_a_job_that_reads_nothing_is_no_error(jobs: MakeJobs) -> None:
    """One that dies before it has read its order just counts as failed."""
    made = jobs("import os; os._exit(1)")
    await made.start(REF, {"much": "x" * 2**20})
    assert (await ended(made)).exit_code == 1


async def test_stopping_ends_the_whole_group_and_counts_as_no_attempt(jobs: MakeJobs, tmp_path: Path) -> None:
    """Children of a job go with it, also if they ignore SIGTERM."""
    pid_file = tmp_path / "pid"
    child = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(100)"
    code = (
        "import pathlib, subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"pathlib.Path({str(pid_file)!r}).write_text(str(p.pid))\n"
        "time.sleep(100)"
    )
    made = jobs(code)
    await made.start(REF, {})
    while not pid_file.exists() or not pid_file.read_text():  # noqa: ASYNC110 - as above
        await asyncio.sleep(0.02)
    await made.stop(REF, grace_s=0.5)
    job = made.observe()[REF]
    assert (job.running, job.attempts) == (False, 0)
    child_pid = int(pid_file.read_text())
    for _ in range(500):
        if not psutil.pid_exists(child_pid) or psutil.Process(child_pid).status() == psutil.STATUS_ZOMBIE:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("the job's child is still there")
