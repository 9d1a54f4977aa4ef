"""Random faults under load, and whether everything is as it should be during and after them.

    python benchmarks/chaos.py [--minutes 20] [--rate 4] [--seed 1] [--only TEXT] [--json FILE]

kill -9 and SIGSTOP of a Serve replica, a rank, the Serve controller, Ray's proxy, a Ray node, the store,
the key service and the operator, and the network to Serve and to the key service cut or silent: each
in turn, in seeded random order, for a random time at a random moment. Real key service, operator, Ray
of two nodes, S3 store and SDK; two tenants on the fake engine, whose answers depend on key and prompt,
one on the torch engine with a small model on two ranks. Keys are rotated all the while. What Ray
repairs, it repairs; what a supervisor would start again (key service, operator, store, a dead node),
this program starts again when the fault is over.

It fails unless every request ended in the right answer or in a documented error, none lasted past its
deadline, everything was back within a minute of the last repair, nothing was left behind, and no kind of
fault found nothing to strike each time. It takes
about three minutes more than ``--minutes``; the report holds the cause of every request that was not right.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.trial.clients import Caller, Met, Outcome, arrivals, errors_met, failures, latencies, tally  # noqa: E402 -- the checkout, not a package
from benchmarks.trial.faults import FAULTS, Fault, NothingToStrike, Struck, sequence, struck  # noqa: E402 -- as above
from benchmarks.trial.models import Subject, fake_subject, sharded_subject  # noqa: E402 -- as above
from benchmarks.trial.site import Site, running_site  # noqa: E402 -- as above
from benchmarks.trial.stand import POLICY, left_over  # noqa: E402 -- as above

from anamorph.cli.machine.home import MODEL, TENANTS  # noqa: E402 -- as above
from anamorph.cli.machine.signals import end_as_interrupt  # noqa: E402 -- as above
from anamorph.errors import AnamorphError  # noqa: E402 -- as above
from anamorph.wire.admin import Role  # noqa: E402 -- as above

BACK_WITHIN_S = 60.0
PATIENCE_S = 240.0
DELAY_MS, TOKENS = 20.0, (8, 48)
LASTS_S, APART_S = (2.0, 12.0), (4.0, 12.0)
CALLERS = 4
# A tenant whose replica has two ranks.
SHARDED = "initech"


@dataclass
class Chaos:
    """What happened."""

    met: list[Met] = field(default_factory=list)
    struck: list[Struck] = field(default_factory=list)
    spared: list[str] = field(default_factory=list)
    unrepaired: list[str] = field(default_factory=list)
    rotations: list[str] = field(default_factory=list)
    back_s: float | None = None
    amiss: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def broken(self) -> list[str]:
        """What does not hold of the promises at the top."""
        counted = tally(self.met)
        bad = [o for o in Outcome if o not in (Outcome.RIGHT, Outcome.REFUSED) and counted[o.value]]
        found = [f"{counted[outcome.value]} requests: {outcome.value}" for outcome in bad]
        if self.back_s is None:
            found.append(f"not back after {PATIENCE_S:.0f} s: {'; '.join(self.amiss)}")
        elif self.back_s > BACK_WITHIN_S:
            found.append(f"back only after {self.back_s:.0f} s")
        found += [f"never struck: {one}" for one in self.never_struck]
        return found + self.unrepaired + [f"left behind: {one}" for one in self.left]

    @property
    def never_struck(self) -> list[str]:
        """Faults whose turn came and that found nothing to strike each time."""
        return sorted({one.partition(":")[0] for one in self.spared} - {one.name for one in self.struck})


async def under_load(
    site: Site, subjects: Mapping[str, Subject], faults: Sequence[Fault], options: argparse.Namespace
) -> Chaos:
    """Faults while clients ask and keys rotate; then wait until everything is back."""
    chaos, stop = Chaos(), asyncio.Event()
    loads, callers = [], list[Caller]()
    for number, (tenant, subject) in enumerate(subjects.items()):
        own = _callers(site, tenant, subject)
        rate, seed = options.rate / len(subjects), options.seed + number
        loads.append(asyncio.create_task(arrivals(own, subject.questions, rate, stop, seed, chaos.met)))
        callers += own
    over = asyncio.Event()
    rotating = asyncio.create_task(_keep_rotating(site, over, options.rotate_every, chaos))
    try:
        await asyncio.sleep(5)
        await asyncio.to_thread(_strike, site, faults, options, chaos)
        over.set()  # no new rotation: what then does not run is what the faults have left
        chaos.back_s = await _back(site, chaos)
        await asyncio.to_thread(_look_for_strays, site, chaos)
    finally:
        over.set()
        stop.set()
        await asyncio.gather(*loads, rotating)
        for caller in callers:
            await caller.close()
    return chaos


def _callers(site: Site, tenant: str, subject: Subject) -> list[Caller]:
    key = site.home.api_key(tenant, Role.CLIENT).read_text().strip()
    return [Caller(site.url, key, tenant, MODEL, subject.expected) for _ in range(CALLERS)]


def _strike(site: Site, faults: Sequence[Fault], options: argparse.Namespace, chaos: Chaos) -> None:
    source, end = np.random.default_rng(options.seed), time.monotonic() + 60 * options.minutes
    for fault in sequence(faults, source):
        if time.monotonic() > end:
            break
        lasts = source.uniform(*LASTS_S)
        left = max(0.0, end - time.monotonic()) / 60
        say(f"{left:.1f} min left, {fault.name} for {lasts:.0f} s", chaos)
        try:
            with struck(fault, site, source, chaos.struck):
                time.sleep(lasts)
        except NothingToStrike as missing:
            chaos.spared.append(f"{fault.name}: no {missing}")
        except Exception as error:  # noqa: BLE001 - it fails the run, and the run goes on to its report
            chaos.unrepaired.append(f"{fault.name} failed: {type(error).__name__}: {error}"[:600])
            say(chaos.unrepaired[-1], chaos)
        time.sleep(source.uniform(*APART_S))


def say(text: str, chaos: Chaos) -> None:
    counted = {name: number for name, number in tally(chaos.met).items() if number}
    print(f"{time.strftime('%H:%M:%S')} {text}; {counted}", file=sys.stderr, flush=True)


async def _keep_rotating(site: Site, over: asyncio.Event, every_s: float, chaos: Chaos) -> None:
    """Ask for rotations; one that cannot be accepted now is asked for again later."""
    while not over.is_set():
        with suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), every_s)
            return
        for tenant in site.tenants:
            chaos.rotations.append(await asyncio.to_thread(_rotate, site, tenant))


def _rotate(site: Site, tenant: str) -> str:
    from anamorph.cli.machine.tenants import keys_as

    try:
        with keys_as(site.home, site.url, tenant, Role.ADMIN) as keys:
            return f"v{keys.rotate(tenant, MODEL).version}"
    except Exception as error:  # noqa: BLE001 - the key service may be in any state: it is noted
        return type(error).__name__


async def _back(site: Site, chaos: Chaos) -> float | None:
    """Seconds from the last repair until nothing is amiss and every tenant has right answers only."""
    repaired = chaos.struck[-1].repaired if chaos.struck else time.monotonic()
    while time.monotonic() < repaired + PATIENCE_S:
        asked = time.monotonic()
        chaos.amiss = await asyncio.to_thread(_amiss, site)
        await asyncio.sleep(3)
        since = [one for one in chaos.met if one.intended >= asked]
        chaos.amiss += [f"{one.tenant}: {one.outcome.value} {one.detail}" for one in since if not _right(one)]
        if not chaos.amiss and {one.tenant for one in since if _right(one)} == set(site.tenants):
            say(f"back {asked - repaired:.0f} s after the last repair", chaos)
            return asked - repaired
        seen = chaos.amiss or ["a tenant has had no answer since"]
        say(f"{asked - repaired:.0f} s after the last repair not back: {'; '.join(seen)[:300]}", chaos)
    return None


def _right(one: Met) -> bool:
    return one.outcome is Outcome.RIGHT


def _amiss(site: Site) -> list[str]:
    try:
        return site.what_is_amiss()
    except (OSError, AnamorphError) as error:
        return [f"{type(error).__name__}: {error}"]


def _look_for_strays(site: Site, chaos: Chaos) -> None:
    """Replicas, placement groups and files that belong to nothing; what is still ending gets its time."""
    end = time.monotonic() + BACK_WITHIN_S
    while (found := _strays(site)) and time.monotonic() < end:
        time.sleep(2)
    chaos.left += found


def _strays(site: Site) -> list[str]:
    try:
        files = [f"file {path}" for path in site.home.scratch.rglob("*") if path.is_file()]
        return [f"replica {title}" for title in site.strays()] + _spare_groups(site) + files
    except (OSError, httpx.HTTPError, LookupError, psutil.Error, ValueError) as error:
        return [f"unknown: {type(error).__name__}: {error}"]


def _spare_groups(site: Site) -> list[str]:
    """Placement groups beyond those of the replicas that stand."""
    sharded = sum(name.startswith(f"{SHARDED}.") for name in site.applications())
    return [f"placement group {state}" for state in site.placement_groups()[sharded:]]


def report(chaos: Chaos, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a run."""
    met = chaos.met
    return {
        "not_right": failures(met),
        "minutes": options.minutes,
        "seed": options.seed,
        "per_s": options.rate,
        "faults": len(chaos.struck),
        "spared": chaos.spared,
        "unrepaired": chaos.unrepaired,
        "requests": len(met),
        "outcomes": tally(met),
        "longest_s": round(max((one.seconds for one in met), default=0), 1),
        "errors": errors_met(met),
        "by_fault": by_fault(chaos.struck, met),
        "rotations": chaos.rotations,
        "back_s": chaos.back_s,
        "left": chaos.left,
        "broken": chaos.broken,
    } | latencies(met)


def by_fault(faults: Sequence[Struck], met: Sequence[Met]) -> dict[str, dict[str, Any]]:
    """For each kind of fault: how often, and what requests met that were under way in it or soon after."""
    found: dict[str, dict[str, Any]] = {}
    for fault in faults:
        near = [one for one in met if _overlap(fault, one)]
        entry = found.setdefault(fault.name, {"times": 0, "longest_s": 0.0} | dict.fromkeys(tally([]), 0))
        entry["times"] += 1
        entry["longest_s"] = max([entry["longest_s"], *(round(one.seconds, 1) for one in near)])
        for name, number in tally(near).items():
            entry[name] += number
    return dict(sorted(found.items()))


def _overlap(fault: Struck, one: Met) -> bool:
    return one.intended <= fault.repaired + APART_S[0] and one.intended + one.seconds >= fault.at


def run(options: argparse.Namespace) -> Chaos:
    """One run, from an empty machine to an empty machine."""
    faults = [fault for fault in FAULTS if options.only is None or options.only in fault.name]
    with tempfile.TemporaryDirectory() as folder:
        fake = fake_subject(Path(folder), POLICY, DELAY_MS, TOKENS)
        subjects = dict.fromkeys(TENANTS, fake) | {SHARDED: sharded_subject(Path(folder), POLICY)}
        with running_site({tenant: subject.served for tenant, subject in subjects.items()}) as site:
            instance, folders = site.home.running().instance, (site.home.root.parent, site.cluster.temp_dir)
            chaos = asyncio.run(under_load(site, subjects, faults, options))
            say("ending the system", chaos)
            if options.logs:
                _keep_logs(site, options.logs)
    chaos.left += [f"process {one}" for one in [*site.orphans, *left_over(instance)]]
    chaos.left += [f"folder {path}" for path in folders if path.exists()]
    return chaos


def _keep_logs(site: Site, folder: Path) -> None:
    import shutil

    shutil.copytree(site.home.logs, folder / "logs", dirs_exist_ok=True)
    newest = site.cluster.temp_dir / "session_latest" / "logs"
    shutil.copytree(newest.resolve(), folder / "ray", dirs_exist_ok=True, ignore_dangling_symlinks=True)


def main() -> None:
    """Run, print, and fail where a promise is broken."""
    end_as_interrupt()
    parser = argparse.ArgumentParser(description="Random faults under load.")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--rate", type=float, default=4, help="requests per second of all clients")
    parser.add_argument("--rotate-every", type=float, default=60, help="seconds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="only faults whose name has this in it")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--logs", type=Path, help="keep the logs here")
    options = parser.parse_args()
    try:
        chaos = run(options)
    except pytest.skip.Exception as missing:  # a server's program, with the remedy
        print(missing)
        return
    result = report(chaos, options)
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if chaos.broken:
        sys.exit("\n".join(chaos.broken))


if __name__ == "__main__":
    main()
