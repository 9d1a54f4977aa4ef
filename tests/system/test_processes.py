"""Starting and ending processes: exactly ours, all of ours, also after a kill."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from anamorph.cli.machine.home import Home, Running, SystemState, write_private
from anamorph.cli.machine.processes import alive, end, end_marked, marked, spawn
from anamorph.cli.machine.system import is_up, stop
from anamorph.errors import SetupError

SLEEP = [sys.executable, "-c", "import time; time.sleep(300)"]


@pytest.fixture
def instance() -> Iterator[str]:
    mark = secrets.token_hex(8)
    yield mark
    end_marked(mark)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path / "home")
    made.create()
    return made


@pytest.fixture
def sleeper(home: Home, instance: str) -> Running:
    return spawn("sleeper", SLEEP, home.logs / "sleeper.log", instance)


def test_a_process_is_ended_and_reported_dead(sleeper: Running) -> None:
    """What was started runs, and after its end does not."""
    assert alive(sleeper)
    end([sleeper])
    assert not alive(sleeper)


def test_a_reused_pid_is_left_alone(sleeper: Running) -> None:
    """The same pid with another start time is somebody else's process."""
    stranger = replace(sleeper, started=sleeper.started - 3600)
    assert not alive(stranger)
    end([stranger])
    assert alive(sleeper)


def test_the_mark_finds_children_that_nobody_wrote_down(home: Home, instance: str) -> None:
    """A grandchild in a session of its own, its parent dead, is found and ended."""
    code = f"import subprocess; subprocess.Popen({SLEEP!r}, start_new_session=True)"
    parent = spawn("parent", [sys.executable, "-c", code], home.logs / "parent.log", instance)
    while alive(parent):
        time.sleep(0.02)
    assert len(marked(instance)) == 1
    end_marked(instance)
    assert marked(instance) == []


def test_a_process_that_ignores_sigterm_is_killed(home: Home, instance: str) -> None:
    """Politeness is bounded."""
    ready = home.root / "ready"
    code = (
        f"import signal, time; signal.signal(15, signal.SIG_IGN); open({str(ready)!r}, 'w'); time.sleep(300)"
    )
    stubborn = spawn("stubborn", [sys.executable, "-c", code], home.logs / "stubborn.log", instance)
    while not ready.exists():
        time.sleep(0.02)
    end([stubborn], grace_s=0.2)
    assert not alive(stubborn)


def test_logs_and_state_are_closed_to_others(home: Home, sleeper: Running, instance: str) -> None:
    """0600 and 0700 throughout."""
    home.save(SystemState(instance, (sleeper,)))
    modes = [path.stat().st_mode & 0o077 for path in (home.root, home.logs / "sleeper.log", home.state_file)]
    assert modes == [0, 0, 0]


def test_a_home_that_is_open_to_others_is_refused(tmp_path: Path) -> None:
    """Keys would lie in it."""
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(SetupError, match="chmod 700"):
        Home(tmp_path / "open").create()


def test_stopping_twice_or_nothing_is_fine(home: Home, sleeper: Running, instance: str) -> None:
    """`down` is idempotent, and knows a system that is half dead from one that is up."""
    stop(home)
    home.save(SystemState(instance, (sleeper,), ready=True))
    assert not is_up(home)
    stop(home)
    stop(home)
    assert not alive(sleeper)
    assert home.load() is None


def test_only_one_up_or_down_works_at_a_time(home: Home) -> None:
    """The second is refused, not queued."""
    with home.locked(), pytest.raises(SetupError, match="another"), home.locked():
        pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_watchdog_cleans_up_after_a_killed_command(
    home: Home, sleeper: Running, instance: str, number: signal.Signals
) -> None:
    """However the demo dies, what it started is ended and its home removed."""
    home.save(SystemState(instance, (sleeper,), ready=True))
    ready = home.root / "ready"
    code = (
        "import time, pathlib\n"
        "from anamorph.cli.machine.home import Home\n"
        "from anamorph.cli.machine.watchdog import watched\n"
        f"with watched(Home(pathlib.Path({str(home.root)!r})), remove=True):\n"
        f"    open({str(ready)!r}, 'w').close(); time.sleep(300)"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as command:
        while not ready.exists():
            time.sleep(0.02)
        os.kill(command.pid, number)
    deadline = time.monotonic() + 60
    while home.root.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not home.root.exists()
    assert not alive(sleeper)


def test_private_files_are_written_whole(tmp_path: Path) -> None:
    """A file that is there already is replaced in one step, still 0600."""
    for text in ("one", "two"):
        write_private(tmp_path / "key", text)
    assert (tmp_path / "key").read_text() == "two"
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [tmp_path / "key"]
