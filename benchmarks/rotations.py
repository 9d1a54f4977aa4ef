"""Rotations of one model's key, one after the other, under streaming clients.

    python benchmarks/rotations.py [--rotations 100] [--clients 20] [--rate 10] [--json FILE]
    python benchmarks/rotations.py --model smollm2 --rotations 10 --rate 1

Real key service, operator, Ray and SDK; the fake engine waits 40 ms before each token, as a small
model on a GPU would, and its answers depend on key and prompt, so that one under a wrong key or with
a token missing is seen. The load keeps ten of an engine's 16 places busy: with more, waiting for a
place would be what is measured. Requests start at random times (Poisson), each by one of the clients,
and their times count from when they were to start. A rotation is asked for as soon as the one before
it is active, while the version before that still drains. Steady state is the same load before and
after. It fails where the 99th percentile of whole requests is more than 1.5 times that of steady
state: with the fake engine, for a model that shares its cores with the fold of its next version is
slower, which is reported. On two quiet cores a rotation takes 5 s with the fake engine, all else three
minutes; the report holds the cause of every request that did not end in the right answer, and of every
rotation that failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.trial.clients import Caller, Met, Outcome, arrivals, errors_met, failures, latencies, tally  # noqa: E402 -- the checkout, not a package
from benchmarks.trial.models import Subject, fake_subject, smollm2_subject  # noqa: E402 -- as above
from benchmarks.trial.stand import System, running  # noqa: E402 -- as above

from anamorph.cli.machine.home import MODEL  # noqa: E402 -- as above
from anamorph.cli.machine.signals import end_as_interrupt  # noqa: E402 -- as above
from anamorph.errors import AnamorphError, TooManyRequests, Unavailable  # noqa: E402 -- as above
from anamorph.wire.admin import RotationPolicy  # noqa: E402 -- as above
from anamorph.wire.keyservice import KeyService  # noqa: E402 -- as above
from anamorph.wire.states import State  # noqa: E402 -- as above

TENANT = "acme"
DELAY_MS = 40
TOKENS = (16, 32)
LIMIT = 1.5
STEADY_S = 60.0
POLICY = RotationPolicy(
    client_cache_ttl_s=6,
    longest_request_s=10,
    clock_skew_s=0,
    propagation_s=1,
    grace_s=17,
    destroy_delay_s=60,
)
SLOW = POLICY.model_copy(update={"longest_request_s": 60, "grace_s": 67})
# A real model on shared cores may be silent for long while a replica is folded beside it.
PATIENCE: dict[str, dict[str, float]] = {
    "fake": {},
    "smollm2": {"read_s": 60, "retry_for": 60, "deadline_s": 150},
}


# After so many rotations that failed the rest would only repeat the finding.
ENOUGH_FAILED = 3


@dataclass
class Rotations:
    """When they began and ended, in monotonic seconds; what each took; those that failed, with the cause."""

    began: float = 0.0
    ended: float = 0.0
    taken: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def rotate_once(system: System) -> float:
    """Ask for a rotation and wait until the new version is active; seconds it took.

    Raises:
        AssertionError: it failed, or took longer than three minutes.
        AnamorphError: the key service refused it.
    """
    began = time.monotonic()
    # One connection: a new one for every look at the state would take time from the clients' process.
    with system.keys() as keys:
        version = asked(keys)

        def state() -> State:
            return keys.get_version(TENANT, MODEL, version).state

        system.await_until(lambda: state() in {State.ACTIVE, State.FAILED})
        assert state() is not State.FAILED, f"version {version} failed; the operator's log says why"
    return time.monotonic() - began


def asked(keys: KeyService) -> int:
    """The version of a rotation that was accepted; one that comes too early is asked for again."""
    while True:
        try:
            return keys.rotate(TENANT, MODEL).version
        except (TooManyRequests, Unavailable) as error:
            time.sleep(error.retry_after or 1)


async def under_load(
    system: System, subject: Subject, options: argparse.Namespace, met: list[Met]
) -> Rotations:
    """Steady state, rotations, steady state."""
    key = system.api_key().strip()
    callers = [
        Caller(system.url, key, TENANT, MODEL, subject.expected, **PATIENCE[options.model])
        for _ in range(options.clients)
    ]
    stop = asyncio.Event()
    load = asyncio.create_task(arrivals(callers, subject.questions, options.rate, stop, options.seed, met))
    try:
        await asyncio.sleep(STEADY_S)
        done = await asyncio.to_thread(rotate, system, options.rotations, met)
        await asyncio.sleep(STEADY_S + subject.served.policy.grace_s)
        return done
    finally:
        stop.set()
        await load
        for caller in callers:
            await caller.close()


def rotate(system: System, wanted: int, met: Sequence[Met]) -> Rotations:
    """So many rotations one after the other; one that fails is noted, and the next is asked for."""
    done = Rotations(began=time.monotonic())
    for number in range(1, wanted + 1):
        try:
            done.taken.append(rotate_once(system))
        except (AssertionError, AnamorphError) as error:
            done.failed.append(f"rotation {number}: {type(error).__name__}: {error}")
        say(number, wanted, met, done)
        if len(done.failed) == ENOUGH_FAILED:
            break
    done.ended = time.monotonic()
    return done


def say(number: int, of: int, met: Sequence[Met], done: Rotations) -> None:
    bad = sum(one.outcome is not Outcome.RIGHT for one in met)
    last = f"{done.taken[-1]:.1f} s" if done.taken else "failed"
    print(
        f"{time.strftime('%X')} rotation {number}/{of}: {last}, {len(done.failed)} failed; "
        f"{len(met)} requests, {bad} not right",
        file=sys.stderr,
        flush=True,
    )


def ratio(before: Sequence[float], during: Sequence[float], share: float = 99) -> tuple[float, float, float]:
    """Ratio of a percentile, during over before, with a 95 % bootstrap interval."""
    source = np.random.default_rng(0)
    old, new = np.asarray(before), np.asarray(during)

    def percentile(values: Any) -> float:
        return float(np.percentile(source.choice(values, len(values)), share))

    drawn = [percentile(new) / percentile(old) for _ in range(1000)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(np.percentile(new, share) / np.percentile(old, share)), float(low), float(high)


def report(met: Sequence[Met], done: Rotations, grace_s: float) -> dict[str, Any]:
    """What the clients met, in steady state and while keys rotated."""
    first = min(one.intended for one in met)
    # The first seconds open connections; after the last rotation two versions still drain.
    steady = [m for m in met if first + 5 < m.intended < done.began or m.intended > done.ended + grace_s]
    during = [m for m in met if done.began <= m.intended <= done.ended]
    times: dict[str, Callable[[Met], float | None]] = {
        "e2el": lambda m: m.seconds,
        "ttft": lambda m: m.first_s,
        "tpot": lambda m: m.per_token_s,
    }
    ratios = {}
    for name, of in times.items():
        old, new = ([v for m in part if (v := of(m)) is not None] for part in (steady, during))
        if old and new:
            ratios[f"{name}_p99_ratio"] = [round(x, 3) for x in ratio(old, new)]
    took = {"median": float(np.median(done.taken)), "longest": max(done.taken)} if done.taken else {}
    return {
        "not_right": failures(met),
        "failed_rotations": done.failed,
        "rotations": len(done.taken),
        "rotation_s": took,
        "requests": len(met),
        "outcomes": tally(met),
        "errors": errors_met(met),
        "versions_used": len({m.key_id for m in met if m.key_id}),
        "steady": {"requests": len(steady)} | latencies(steady),
        "during": {"requests": len(during)} | latencies(during),
    } | ratios


def main() -> None:
    """Rotate under load, print, and fail where an answer was wrong or missing."""
    end_as_interrupt()
    parser = argparse.ArgumentParser(description="Rotations under streaming clients.")
    parser.add_argument("--model", choices=("fake", "smollm2"), default="fake")
    parser.add_argument("--rotations", type=int, default=100)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--rate", type=float, default=10, help="requests per second of all clients")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    met: list[Met] = []
    with tempfile.TemporaryDirectory() as folder:
        fake = options.model == "fake"
        subject = fake_subject(Path(folder), POLICY, DELAY_MS, TOKENS) if fake else smollm2_subject(SLOW)
        with running(subject.served, tenants=(TENANT,)) as system:
            done = asyncio.run(under_load(system, subject, options, met))
    result = {"model": options.model, "clients": options.clients, "per_s": options.rate} | report(
        met, done, subject.served.policy.grace_s
    )
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    wrong = len(met) - result["outcomes"][Outcome.RIGHT.value]
    if wrong or done.failed:
        sys.exit(f"{wrong} requests did not end in the right answer, {len(done.failed)} rotations failed")
    slower = result["e2el_p99_ratio"][0]
    if fake and slower > LIMIT:
        sys.exit(f"whole requests' 99th percentile is {slower} times that of steady state, more than {LIMIT}")


if __name__ == "__main__":
    main()
