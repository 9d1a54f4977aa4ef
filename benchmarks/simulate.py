"""Ten thousand tenants on paper: devices and waiting under each placement, by discrete-event simulation.

    python benchmarks/simulate.py [--inputs FILE] [--rate 60] [--slo 2] [--json FILE] [--plot FILE]

Fed with service times from a file (``benchmarks/service_times.py`` makes it). Tenants ask by Zipf's law, in
sessions, with log-normal lengths; several base models; every tenant's key is rotated at a random
moment of the day, with both versions in place until the drain is over. For each placement it
looks for the fewest devices whose 99th percentile of the time to first token meets --slo. The
simulator is held against queueing theory by ``tests/benchmarks/test_simulation.py``.

``plaintext`` is the same traffic without encryption: one replica of each base serves all its tenants.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.simulation.placements import NAMES  # noqa: E402 -- the checkout, not a package
from benchmarks.simulation.run import Scenario  # noqa: E402 -- as above
from benchmarks.simulation.search import Needed, Say, needed  # noqa: E402 -- as above
from benchmarks.simulation.service import Inputs  # noqa: E402 -- as above

INPUTS = Path(__file__).parent / "simulation" / "inputs" / "h100.json"


def compare(inputs: Inputs, scenario: Scenario, slo_s: float, say: Say) -> list[Needed]:
    """Every placement of every model."""
    return [
        needed(name, inputs, service, scenario, slo_s, say) for name in NAMES for service in inputs.services
    ]


def table(found: Sequence[Needed]) -> Table:
    """One line for each placement and model, and the sum of devices."""
    shown = Table("placement", "model", "devices", "TTFT p50", "p99", "TPOT p99", "busy", "loads", "places")
    for one in found:
        result = one.result
        numbers = [one.name, one.model, str(one.devices)]
        numbers += [f"{s:.3g} s" for s in (result.ttft(0.5), result.ttft(0.99), result.tpot(0.99))]
        numbers += [f"{result.busy:.0%}", f"{result.loads:,}", f"{result.peak_places:,}"]
        shown.add_row(*numbers)
    for name in NAMES:
        shown.add_row(name, "all", str(sum(one.devices for one in found if one.name == name)))
    return shown


def plot(found: Sequence[Needed], file: Path, slo_s: float) -> None:
    """Waiting against devices, one panel per model."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    models = list(dict.fromkeys(one.model for one in found))
    figure, panels = plt.subplots(1, len(models), figsize=(4.2 * len(models), 3.6), squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        for one in (one for one in found if one.model == model):
            curve = sorted(one.curve, key=lambda r: r.devices)
            waits = [result.ttft(0.99) for result in curve]  # infinite where overloaded: not drawn
            panel.plot([r.devices for r in curve], waits, "o-", label=one.name, markersize=4)
        panel.axhline(slo_s, color="grey", linestyle=":", linewidth=1)
        panel.set(title=model, xlabel="devices", xscale="log", yscale="log")
    panels[0][0].set_ylabel("99th percentile of TTFT in s")
    panels[0][-1].legend()
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Devices and waiting of 10,000 tenants, simulated.")
    parser.add_argument("--inputs", type=Path, default=INPUTS)
    parser.add_argument("--tenants", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=60, help="requests per second of all tenants")
    parser.add_argument(
        "--minutes", type=float, default=20, help="simulated and measured, after ten of warm-up"
    )
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of the tenants' traffic")
    parser.add_argument("--rotations", type=float, default=1.0, help="of each tenant's key per day")
    parser.add_argument("--drain", type=float, default=600, help="seconds that both versions are kept")
    parser.add_argument("--slo", type=float, default=2.0, help="seconds to the first token, 99th percentile")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args(arguments)


def scenario_of(options: argparse.Namespace) -> Scenario:
    return Scenario(
        seed=options.seed,
        tenants=options.tenants,
        per_s=options.rate,
        exponent=options.zipf,
        seconds=60 * options.minutes,
        rotations_per_day=options.rotations,
        drain_s=options.drain,
    )


def main() -> None:
    """Compare, print, write."""
    options = options_of(sys.argv[1:])
    console, began = Console(), time.monotonic()
    if not console.is_terminal:  # a file has no width, and cut figures are none
        console.width = 120
    inputs, scenario = Inputs.read(options.inputs), scenario_of(options)
    with console.status("simulating") as status:

        def say(text: str) -> None:
            status.update(text)
            if not console.is_terminal:
                print(f"{time.monotonic() - began:5.0f} s  {text}", file=sys.stderr, flush=True)

        found = compare(inputs, scenario, options.slo, say)
    console.print(f"{inputs.device.name}; {scenario}", highlight=False)
    console.print(table(found))
    report: dict[str, Any] = {
        "inputs": inputs.model_dump(mode="json"),
        "scenario": vars(scenario),
        "slo_s": options.slo,
        "seconds": round(time.monotonic() - began, 1),
        "placements": [one.row() for one in found],
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.plot:
        plot(found, options.plot, options.slo)


if __name__ == "__main__":
    main()
