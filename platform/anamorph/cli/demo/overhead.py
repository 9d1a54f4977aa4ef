"""Step 5: the canary measures what encryption costs."""

from __future__ import annotations

import httpx
from rich.progress import Progress

from anamorph.canary import OverheadReport, Target, measure, save_plot, terminal_plot
from anamorph.cli.demo.stage import ACME, Stage
from anamorph.cli.machine.home import MODEL
from anamorph.cli.machine.tenants import active_version
from anamorph.errors import SetupError

PROMPT_TOKENS = 48
OUTPUT_TOKENS = 20


def show_overhead(stage: Stage) -> None:
    """Measure, print, and write JSON and PNG."""
    report = _measure(stage)
    stage.reports.mkdir(parents=True, exist_ok=True)
    numbers, picture = stage.reports / "overhead.json", stage.reports / "overhead.png"
    numbers.write_text(report.to_json())
    save_plot(report, picture)
    stage.console.print(report.table())
    stage.console.print(terminal_plot(report), highlight=False, markup=False)
    stage.console.print(f"  written: {numbers} and {picture}", highlight=False)
    stage.check(report.ratios["tpot"].low < 2, "per-token time is of the order of the plaintext's")


def _measure(stage: Stage) -> OverheadReport:
    with stage.keys(ACME) as keys:
        version = active_version(keys, ACME)
        vocab_size = keys.get_model(ACME, MODEL).vocab_size
    if version is None or version.endpoint is None:
        raise SetupError("acme has no active version to measure")
    encrypted = Target(version.endpoint, stage.token(ACME), version.key_id)
    plaintext = Target(f"{stage.urls['serve']}/plaintext/{MODEL}/v0", stage.token("plaintext"))
    with (
        Progress(console=stage.console, transient=True) as progress,
        httpx.Client(timeout=120, trust_env=False) as http,
    ):
        bar = progress.add_task("pairs of independent random prompts, in turn")
        return measure(
            encrypted,
            plaintext,
            model=MODEL,
            vocab_size=vocab_size,
            http=http,
            pairs=stage.pairs,
            prompt_tokens=PROMPT_TOKENS,
            output_tokens=OUTPUT_TOKENS,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
