"""``anamorph up``: start the whole system on this machine and leave it running."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from anamorph.cli.machine.home import MODEL, TENANTS, Home, HomeOption, SystemState
from anamorph.cli.machine.model import default_model
from anamorph.cli.machine.progress import Steps
from anamorph.cli.machine.signals import end_as_interrupt, undisturbed
from anamorph.cli.machine.system import Plan, is_up, start, stop
from anamorph.cli.machine.tenants import ServedModel
from anamorph.cli.machine.watchdog import watched
from anamorph.wire.admin import Dtype


def up(
    home: HomeOption = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Hugging Face folder with a tokenizer; by default SmolLM2-135M-Instruct."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Type that the engines compute in.")] = "float32",
    otlp_endpoint: Annotated[str | None, typer.Option(help="Collector of traces and metrics.")] = None,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay; Ctrl-C stops everything.")] = False,
) -> None:
    """Start key service, reconciler and Ray Serve with two tenants, and leave them running."""
    end_as_interrupt()
    console, place = Console(), Home.at(home)
    place.create()
    if foreground:
        with watched(place, remove=False):
            _bring_up(console, place, model, dtype, otlp_endpoint)
            _wait_for_signal(console)
            with undisturbed(), console.status("stopping"):
                stop(place)
        return
    _bring_up(console, place, model, dtype, otlp_endpoint)


def _bring_up(
    console: Console, home: Home, folder: Path | None, dtype: Dtype, otlp_endpoint: str | None
) -> None:
    with home.locked():
        if is_up(home):
            console.print("It runs already.")
        else:
            stop(home)  # what a killed or half-dead former start has left
            with Steps(console) as steps:
                steps.say("looking for the model")
                found = folder.absolute() if folder else default_model(dtype, steps.say)
                served = ServedModel(found, dtype=dtype)
                start(home, Plan(served, otlp_endpoint=otlp_endpoint), steps.say, steps.report)
        show_urls(console, home.running())


def show_urls(console: Console, state: SystemState) -> None:
    """Print where everything listens, and what to do next."""
    urls = state.urls
    console.print(
        f"\nOpenAI API of {TENANTS[0]}   [b]{urls[f'proxy-{TENANTS[0]}']}[/b]   model [b]{MODEL}[/b]"
    )
    console.print(f"key service          {urls['keysvc']}")
    console.print(f"encrypted endpoints  {urls['serve']}/TENANT/{MODEL}/vN")
    console.print(f"Ray dashboard        {urls['dashboard']}")
    console.print(
        '\nNext: [b]anamorph chat "What is the capital of France?"[/b], anamorph status, anamorph down'
    )


def _wait_for_signal(console: Console) -> None:
    console.print("\nCtrl-C stops everything.")
    try:
        signal.pause()
    except KeyboardInterrupt:
        return
