"""Open-loop load of many tenants on a real Ray, every answer checked, figures as of ``vllm bench serve``.

    python benchmarks/load.py [--tenants 8] [--rate 10] [--requests 400] [--json FILE]

On locust: its statistics, its event hooks, its gevent. Locust's own users are a closed loop: one that
waits for its answer asks nothing meanwhile, and a slow server is asked less. So arrivals are drawn here
(Poisson, seeded) and each gets a greenlet of its own; all times count from when a request was to start,
whether or not the machine was able to start it then. Lengths are log-normal, tenants by Zipf's law,
answers streams of token ids, compared with what the fake engine must say under the tenant's key.
"""

from __future__ import annotations

# First: it makes sockets and sleeps cooperative before anything else has taken hold of them.
from locust.env import Environment  # isort: skip

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gevent
import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.applications import Cluster, tenant  # noqa: E402 -- the checkout, not a package
from benchmarks.simulation.traffic import zipf  # noqa: E402 -- as above

from anamorph.cli.machine.signals import end_as_interrupt  # noqa: E402 -- as above
from anamorph.errors import AnamorphError  # noqa: E402 -- as above
from anamorph.serve.cluster.local import start_ray, stop_ray  # noqa: E402 -- as above
from anamorph.serve.engines.fake import continuation  # noqa: E402 -- as above
from anamorph.wire import completions  # noqa: E402 -- as above

VOCAB = 1000
PROMPT, OUTPUT, SPREAD, LONGEST = 120.0, 24.0, 0.7, 1000
PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Request:
    """What is asked: of whom, and when, in seconds after the beginning."""

    at: float
    tenant: int
    prompt: list[int]
    tokens: int


@dataclass
class Answer:
    """What came of a request; seconds from when it was to start."""

    request: Request
    late_s: float
    seconds: float = 0.0
    arrived: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.arrived[0]

    @property
    def tpot_s(self) -> float | None:
        """Seconds per token after the first."""
        if len(self.arrived) < 2:
            return None
        return (self.arrived[-1] - self.arrived[0]) / (len(self.arrived) - 1)

    @property
    def itl_s(self) -> list[float]:
        """Seconds between tokens."""
        return np.diff(self.arrived).tolist()


def draw(seed: int, requests: int, per_s: float, tenants: int, exponent: float = 1.0) -> list[Request]:
    """Requests at Poisson times; the same for the same seed."""
    source = np.random.default_rng(seed)
    at = np.cumsum(source.exponential(1 / per_s, requests))
    owner = source.choice(tenants, requests, p=zipf(tenants, exponent))
    prompts, outputs = (
        np.clip(source.lognormal(np.log(median), SPREAD, requests), 1, LONGEST).astype(int)
        for median in (PROMPT, OUTPUT)
    )
    ids = [source.integers(0, VOCAB, length).tolist() for length in prompts]
    rows = zip(at.tolist(), owner.tolist(), ids, outputs.tolist(), strict=True)
    return [Request(*row) for row in rows]


class Load:
    """Sends requests at their times and notes what came of each, for locust's statistics too."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._http = httpx.Client(
            timeout=60,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=100),
            trust_env=False,
        )
        self.environment = Environment()
        self._runner = self.environment.create_local_runner()  # which feeds the statistics
        self.answers: list[Answer] = []

    def run(self, requests: Sequence[Request]) -> float:
        """Send all of them; seconds until the last has ended."""
        began = time.perf_counter()
        running = []
        for request in requests:
            gevent.sleep(max(0.0, began + request.at - time.perf_counter()))
            running.append(gevent.spawn(self._one, request, began + request.at))
        gevent.joinall(running)
        self._runner.quit()
        self._http.close()
        return time.perf_counter() - began

    def _one(self, request: Request, intended: float) -> None:
        answer = Answer(request, time.perf_counter() - intended)
        try:
            ids = self._stream(request, intended, answer)
            if ids != continuation(
                self._cluster.key_id(request.tenant), request.prompt, request.tokens, VOCAB
            ):
                answer.error = "wrong answer"
        except AnamorphError as error:
            answer.error = f"{type(error).__name__}: {error}"
        answer.seconds = time.perf_counter() - intended
        self.answers.append(answer)
        request_ended: Any = self.environment.events.request
        request_ended.fire(
            request_type="POST",
            name="/v1/completions",
            response_time=1e3 * answer.seconds,
            response_length=len(answer.arrived),
            exception=None if answer.error is None else RuntimeError(answer.error),
            context={"tenant": tenant(request.tenant)},
        )

    def _stream(self, request: Request, intended: float, answer: Answer) -> list[int]:
        number, ids = request.tenant, list[int]()
        body = {"prompt": request.prompt, "max_tokens": request.tokens, "temperature": 0, "ignore_eos": True}
        key_id, token = self._cluster.key_id(number), self._cluster.token(number)
        chunks = completions.stream(
            self._http, self._cluster.endpoint(number), body, token=token, key_id=key_id
        )
        for chunk in chunks:
            for choice in chunk.choices:
                answer.arrived += [time.perf_counter() - intended] * len(choice.token_ids)
                ids += choice.token_ids
        return ids


def report(answers: Sequence[Answer], seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """The figures by the names that ``vllm bench serve`` gives them."""
    good = [one for one in answers if one.error is None]
    tokens = sum(len(one.arrived) for one in good)
    kept = [o for o in good if 1e3 * o.ttft_s <= options.ttft and 1e3 * (o.tpot_s or 0) <= options.tpot]
    times = {
        "ttft": [one.ttft_s for one in good],
        "tpot": [one.tpot_s for one in good if one.tpot_s is not None],
        "itl": [gap for one in good for gap in one.itl_s],
        "e2el": [one.seconds for one in good],
    }
    found = {
        "backend": "anamorph, fake engine",
        "num_prompts": len(answers),
        "completed": len(good),
        "failed": len(answers) - len(good),
        "errors": sorted({one.error for one in answers if one.error}),
        "request_rate": options.rate,
        "burstiness": 1.0,
        "tenants": options.tenants,
        "duration": seconds,
        "total_input_tokens": sum(len(one.request.prompt) for one in good),
        "total_output_tokens": tokens,
        "request_throughput": len(good) / seconds,
        "output_throughput": tokens / seconds,
        "request_goodput": len(kept) / seconds,
        "goodput_config_dict": {"ttft": options.ttft, "tpot": options.tpot},
        "latest_start_ms": 1e3 * max(one.late_s for one in answers),
    }
    return found | {k: v for name, values in times.items() for k, v in spread(name, values).items()}


def spread(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Mean, median, deviation and percentiles in milliseconds."""
    values = 1e3 * np.asarray(seconds if seconds else [np.nan])
    shown = {
        f"mean_{name}_ms": values.mean(),
        f"median_{name}_ms": np.median(values),
        f"std_{name}_ms": values.std(),
    }
    shown |= {f"p{share}_{name}_ms": np.percentile(values, share) for share in PERCENTILES}
    return {key: float(value) for key, value in shown.items()}


def table(found: dict[str, Any]) -> Table:
    """Times in milliseconds, one line per kind."""
    columns = ["mean", *(f"p{share}" for share in PERCENTILES)]
    shown = Table("ms", *columns)
    for name in ("ttft", "tpot", "itl", "e2el"):
        shown.add_row(name.upper(), *(f"{found[f'{column}_{name}_ms']:.1f}" for column in columns))
    return shown


@contextmanager
def served(tenants: int, delay_ms: float) -> Iterator[Cluster]:
    """A Ray with one application of the fake engine for each tenant."""
    with tempfile.TemporaryDirectory(prefix="an-") as home:
        ray = start_ray(Path(home), num_cpus=1000)
        try:
            cluster = Cluster(ray, f"fake:?vocab_size={VOCAB}&delay_ms={delay_ms}", encrypted=True)
            cluster.write(cluster.body(tenants))
            cluster.await_running(tenants)
            yield cluster
            cluster.http.close()
        finally:
            stop_ray(ray)


def main() -> None:
    """Serve, load, print; fail where an answer was wrong or missing."""
    end_as_interrupt()
    parser = argparse.ArgumentParser(description="Open-loop load with checked answers.")
    parser.add_argument("--tenants", type=int, default=8)
    parser.add_argument("--rate", type=float, default=10, help="requests per second of all tenants")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--delay", type=float, default=20, help="milliseconds of the engine per token")
    parser.add_argument("--ttft", type=float, default=500, help="milliseconds; what counts as good")
    parser.add_argument("--tpot", type=float, default=50, help="milliseconds; what counts as good")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    requests = draw(options.seed, options.requests, options.rate, options.tenants)
    with served(options.tenants, options.delay) as cluster:
        load = Load(cluster)
        seconds = load.run(requests)
    found = report(load.answers, seconds, options)
    Console().print(table(found))
    print(json.dumps(found, indent=1))
    total = load.environment.stats.total
    assert total.num_requests == len(requests), "locust has counted otherwise"
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if found["failed"]:
        sys.exit(f"{found['failed']} requests failed: {found['errors']}")


if __name__ == "__main__":
    main()
