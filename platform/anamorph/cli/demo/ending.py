"""Step 6: everything is stopped, and that is checked."""

from __future__ import annotations

from anamorph.cli.demo.stage import Stage
from anamorph.cli.machine.processes import marked
from anamorph.cli.machine.signals import undisturbed
from anamorph.cli.machine.system import stop


def leave_nothing(stage: Stage) -> None:
    """Stop the system and count what carries its mark, whoever started it."""
    instance = stage.home.running().instance
    before = len(marked(instance))
    with undisturbed(), stage.console.status("stopping"):
        stop(stage.home)
    left = len(marked(instance))
    stage.console.print(f"  processes before: {before}, processes left: {left}")
    stage.check(left == 0, "no process stays behind")
