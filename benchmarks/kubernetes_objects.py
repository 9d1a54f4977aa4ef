"""What settled ``EncryptedModel`` objects cost the API server, the key service and the operator.

    python benchmarks/kubernetes_objects.py [--objects 1000] [--minutes 10] [--interval 2] [--json FILE]

A real API server and etcd, the key service over HTTP, the operator as a process of its own with its
lease. Each object has a namespace and a tenant of its own, with a tiny replica that was published beforehand
through the real store and key service; 500 lie on each serving cluster. Ray is a stand-in on which
everything runs. Once all objects are Ready and nothing is written any more, every call is counted: those to
the API server by its own audit log, watches included, those to the key service before its application.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.objects.records import dumped  # noqa: E402 -- the checkout, not a package
from benchmarks.objects.stand import Stand, changes, settle, standing  # noqa: E402 -- as above

from anamorph.cli.machine.signals import end_as_interrupt  # noqa: E402 -- as above

SLICE_S = 10.0
QUIET_S = 20.0
PATIENCE_S = 1800.0


def measure(stand: Stand, seconds: float, progress: Any = None) -> dict[str, Any]:
    """Count for so long."""
    process = stand.process()
    began, used, asked = time.time(), process.cpu_times(), _asked(stand)
    while (left := began + seconds - time.time()) > 0:
        time.sleep(min(left, 1.0))
        if progress is not None:
            progress("seconds measured", int(time.time() - began), int(seconds))
    ended, now = time.time(), process.cpu_times()
    calls = [call for call in stand.calls() if began <= call.at < ended]
    keysvc = [(at, what) for at, what in list(stand.keysvc.calls) if began <= at < ended]
    cores = (now.user + now.system - used.user - used.system) / (ended - began)
    per_object_hour = 3600 / (ended - began) / stand.objects
    return {
        "objects": stand.objects,
        "clusters": len(stand.rays),
        "seconds": ended - began,
        "kubernetes": _counted([(call.at, str(call)) for call in calls], began, ended, per_object_hour),
        "written": sorted({str(call) for call in calls if changes(call)}),
        "key service": _counted(keysvc, began, ended, per_object_hour),
        "ray per object and hour": (_asked(stand) - asked) * per_object_hour,
        "turns of each cluster": _turns(calls, stand),
        "operator": {"cores": cores, "mb": process.memory_info().rss / 2**20},
    }


def _asked(stand: Stand) -> int:
    return sum(ray.asked for ray in stand.rays)


def _turns(calls: Iterable[Any], stand: Stand) -> float:
    return sum(str(call) == "list jobs" for call in calls) / len(stand.rays)


def _counted(
    calls: Sequence[tuple[float, str]], began: float, ended: float, per_object_hour: float
) -> dict[str, Any]:
    """Calls by kind, and how evenly they come: a hot loop would show in the busiest ten seconds."""
    slices = Counter(int((at - began) // SLICE_S) for at, _ in calls)
    return {
        "calls": dict(Counter(what for _, what in calls).most_common()),
        "per object and hour": len(calls) * per_object_hour,
        "in ten seconds": {
            "mean": len(calls) * SLICE_S / (ended - began),
            "most": max(slices.values(), default=0),
        },
    }


class Shown:
    """Progress bars, one for each thing that progresses."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, of: int) -> None:
        """Show how much of something is done."""
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=of)
        self._progress.update(self._tasks[what], completed=done)


def show(result: dict[str, Any]) -> None:
    """Print the calls as a table."""
    table = Table("to", "call", "count", "per object and hour")
    for whom in ("kubernetes", "key service"):
        found, hour = result[whom], 3600 / result["seconds"] / result["objects"]
        for what, count in found["calls"].items():
            table.add_row(whom, what, f"{count:,}", f"{count * hour:.3f}")
        table.add_row(whom, "all", f"{sum(found['calls'].values()):,}", f"{found['per object and hour']:.3f}")
    Console().print(table)


def main() -> None:
    """Publish, settle, measure, print."""
    end_as_interrupt()
    parser = argparse.ArgumentParser(description="What settled objects cost.")
    parser.add_argument("--objects", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--interval", type=float, default=2, help="seconds between two turns")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # On standard error, so that the figures can be piped.
    with tempfile.TemporaryDirectory(prefix="an-") as folder, Progress(console=Console(stderr=True)) as bars:
        shown = Shown(bars)
        with standing(Path(folder), options.objects, options.interval, shown) as stand:
            took = settle(stand, QUIET_S, PATIENCE_S, shown)
            before = [call for call in stand.calls() if changes(call)]
            result = measure(stand, 60 * options.minutes, shown)
    result["start"] = {"seconds": took, "writes per object": len(before) / options.objects}
    show(result)
    print(dumped(result))
    if options.json:
        options.json.write_text(dumped(result) + "\n")


if __name__ == "__main__":
    main()
