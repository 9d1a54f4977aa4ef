"""The order of the demo. A claim that does not hold makes it exit with 1."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.rule import Rule

from anamorph.cli.demo.ending import leave_nothing
from anamorph.cli.demo.overhead import show_overhead
from anamorph.cli.demo.questions import ask_questions
from anamorph.cli.demo.refusals import show_refusals
from anamorph.cli.demo.rotation import rotate_under_load
from anamorph.cli.demo.stage import Stage
from anamorph.cli.demo.start import start_everything
from anamorph.cli.machine.home import Home
from anamorph.cli.machine.signals import end_as_interrupt, undisturbed
from anamorph.cli.machine.system import stop
from anamorph.cli.machine.watchdog import watched
from anamorph.wire.admin import Dtype

ACTS: tuple[tuple[str, Callable[[Stage], None]], ...] = (
    (
        "Key service, reconciler, Ray Serve; two tenants, two encrypted replicas, one plaintext baseline",
        start_everything,
    ),
    ("Three questions through the local OpenAI proxy, with the unmodified openai client", ask_questions),
    ("What must fail, and how", show_refusals),
    ("acme's key is rotated while four clients keep asking", rotate_under_load),
    ("What encryption costs: encrypted against plaintext, in turn", show_overhead),
)


def demo(
    reports: Annotated[Path, typer.Option(help="Folder for the overhead report and plot.")] = Path("reports"),
    dtype: Annotated[Dtype, typer.Option(help="Type that the engines compute in.")] = "float32",
    pairs: Annotated[int, typer.Option(min=2, help="Pairs of requests for the overhead table.")] = 12,
) -> None:
    """Show the whole product working with a real model, then clean up."""
    end_as_interrupt()
    console, began = Console(), time.monotonic()
    home = Home(Path(tempfile.mkdtemp(prefix="anamorph-demo-")))
    stage = Stage(console, home, reports.absolute(), dtype=dtype, pairs=pairs)
    try:
        with watched(home, remove=True):
            _play(stage)
    except KeyboardInterrupt:
        console.print("\nInterrupted; everything was stopped.")
        raise typer.Exit(130) from None
    finally:
        with undisturbed():
            shutil.rmtree(home.root, ignore_errors=True)
    _close(stage, time.monotonic() - began)


def _play(stage: Stage) -> None:
    stage.home.create()
    try:
        for number, (title, act) in enumerate(ACTS, 1):
            stage.console.print(Rule(style="dim"))
            stage.console.print(f"[b]{number}. {title}[/b]", highlight=False)
            act(stage)
        stage.console.print(Rule(style="dim"))
        stage.console.print("[b]6. No process stays behind[/b]", highlight=False)
        leave_nothing(stage)
    finally:
        with undisturbed():
            stop(stage.home)


def _close(stage: Stage, seconds: float) -> None:
    stage.console.print(f"\nThe demo took {seconds / 60:.1f} minutes.")
    if stage.broken:
        stage.console.print(f"[red]{len(stage.broken)} claims did not hold:[/red] {'; '.join(stage.broken)}")
        raise typer.Exit(1)
    stage.console.print("[green]Every claim that was checked holds.[/green]")
