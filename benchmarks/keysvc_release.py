"""How long a release takes at 50 requests per second, over HTTP and sealed as the client asks for it.

    python benchmarks/keysvc_release.py [--vault] [--keys 600] [--rate 50] [--processes 1] [--json FILE]

Keys are taken to STAGED through the API; then a fresh process of the service, whose cache
is empty, releases each once (unwrapping), and then each once more (cached). Requests
arrive at random times (Poisson), whether or not earlier ones are answered, and a latency
counts from the time of arrival to the opened key. With PostgreSQL and Vault where both
are installed (--vault: fail without them), otherwise with SQLite and the local wrapper. With --processes, on
PostgreSQL only, the connections of the tenants are spread evenly, as a load balancer does.
The server, its database, Vault and the asking client share this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.servers.postgres import running_postgres  # noqa: E402 -- the checkout, not a package
from tests.servers.process import Program, free_port  # noqa: E402 -- as above
from tests.servers.production import running_production  # noqa: E402 -- as above
from tests.servers.vault import running_vault  # noqa: E402 -- as above

from anamorph.cli.machine.signals import end_as_interrupt  # noqa: E402 -- as above
from anamorph.wire.admin import (  # noqa: E402 -- as above
    ApiKeyCreate,
    Materialized,
    ModelCreate,
    Probe,
    Role,
    TenantCreate,
)
from anamorph.wire.keyservice import AsyncKeyService, KeyService  # noqa: E402 -- as above
from anamorph_keysvc.homes import Home, init  # noqa: E402 -- as above
from anamorph_keysvc.service.work import utc_now  # noqa: E402 -- as above

TARGET_MS = {"unwrapping": 100.0, "cached": 20.0}
MODELS_PER_TENANT = 30
ARTIFACT = Materialized(
    replica="file:///r", manifest_sha256="0" * 64, probe=Probe(prompts=((1,),), expected=((2,),))
)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and 99th percentile in milliseconds, each with a 95 % bootstrap confidence interval."""
    source = random.Random(0)  # noqa: S311 -- resampling, not secrecy
    found: dict[str, Any] = {"calls": len(seconds)}
    draws = [source.choices(seconds, k=len(seconds)) for _ in range(500)]
    for name, share in (("p50_ms", 0.50), ("p99_ms", 0.99)):
        spread = [quantile(draw, share) for draw in draws]
        found[name] = round(quantile(seconds, share) * 1e3, 2)
        found[f"{name}_95"] = [round(quantile(spread, limit) * 1e3, 2) for limit in (0.025, 0.975)]
    found["mean_ms"] = round(statistics.fmean(seconds) * 1e3, 2)
    return found


class Site:
    """A service whose processes are started one after the other; ``kind`` says on what it stands."""

    def __init__(self, kind: str, platform_key: Path) -> None:
        self.kind, self.platform_key = kind, platform_key

    @contextmanager
    def process(self, name: str) -> Iterator[tuple[str, int]]:
        """URL and process id of a fresh process."""
        raise NotImplementedError


class Production(Site):
    """PostgreSQL and Vault, as ``tests/servers`` sets them up."""

    def __init__(self, ends: ExitStack, folder: Path) -> None:
        (folder / "vault").mkdir()
        postgres = ends.enter_context(running_postgres(durable=True))
        vault = ends.enter_context(running_vault(folder / "vault"))
        (folder / "service").mkdir()
        self._made = ends.enter_context(running_production(folder / "service", postgres, vault))
        super().__init__("PostgreSQL, Vault", self._made.platform_key_file)

    @contextmanager
    def process(self, name: str) -> Iterator[tuple[str, int]]:
        process = self._made.process(name)
        try:
            yield process.url, process.program.pid
        finally:
            process.program.stop()


class Embedded(Site):
    """SQLite and the local wrapper."""

    def __init__(self, folder: Path) -> None:
        self._home = Home(folder / "home")
        init(self._home, utc_now, os.urandom)
        super().__init__("SQLite, local wrapper", self._home.platform_key)

    @contextmanager
    def process(self, name: str) -> Iterator[tuple[str, int]]:
        port = free_port()
        command = [sys.executable, "-m", "anamorph_keysvc.main", "serve", "--home", str(self._home.path)]
        program = Program([*command, "--port", str(port)], self._home.path.parent / f"{name}.log")
        url = f"http://127.0.0.1:{port}"
        program.start(lambda: _alive(url))
        try:
            yield url, program.pid
        finally:
            program.stop()


def _alive(url: str) -> bool:
    try:
        return httpx.get(f"{url}/livez", trust_env=False, timeout=5).is_success
    except httpx.TransportError:
        return False


@contextmanager
def site(*, need_vault: bool) -> Iterator[Site]:
    """PostgreSQL and Vault where they are installed."""
    with ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory()))
        try:
            yield Production(ends, folder)
            return
        except pytest.skip.Exception as missing:
            if need_vault:
                raise SystemExit(str(missing)) from None
            print(f"{missing}; measuring SQLite and the local wrapper")
        yield Embedded(folder)


def prepare(url: str, platform_key: str, keys: int) -> dict[str, str]:
    """Tenants with models, each with a version in STAGED; a client's API key per tenant."""
    tenants = [f"t{number}" for number in range(-(-keys // MODELS_PER_TENANT))]
    with ThreadPoolExecutor(2) as pool:
        secrets = pool.map(lambda tenant: _tenant(url, platform_key, tenant), tenants)
        return dict(zip(tenants, secrets, strict=True))


def _tenant(url: str, platform_key: str, tenant: str) -> str:
    with KeyService(url, platform_key) as platform:
        platform.create_tenant(TenantCreate(id=tenant))
        admin = platform.create_api_key(tenant, ApiKeyCreate(name="bench", role=Role.ADMIN)).secret
        with KeyService(url, admin) as keys:
            for number in range(MODELS_PER_TENANT):
                model = ModelCreate(id=f"m{number}", base="b", vocab_size=50, context_length=64)
                keys.create_model(tenant, model)
                keys.rotate(tenant, model.id)
                while keys.get_version(tenant, model.id, 1).key_id is None:
                    time.sleep(0.2)  # it is being prepared
                grant = platform.materialize(tenant, model.id, 1).secret
                with KeyService(url, grant) as job:
                    job.release(tenant, model.id, 1, "materialize")
                    job.stage(tenant, model.id, 1, ARTIFACT)
        return platform.create_api_key(tenant, ApiKeyCreate(name="bench", role=Role.CLIENT)).secret


async def measure(
    urls: Sequence[str], secrets: dict[str, str], keys: int, rate: float, seed: int
) -> dict[str, Any]:
    """Release every key once, at random times; what failed is counted and named."""
    source = random.Random(seed)  # noqa: S311 -- arrivals, not secrecy
    asked = [(tenant, f"m{number}") for tenant in secrets for number in range(MODELS_PER_TENANT)][:keys]
    source.shuffle(asked)
    turns = zip(cycle(urls), secrets.items())
    clients = {tenant: AsyncKeyService(url, secret) for url, (tenant, secret) in turns}
    taken: list[float] = []
    failures: list[str] = []

    async def one(tenant: str, model: str, arrival: float) -> None:
        await asyncio.sleep(arrival - time.perf_counter())
        try:
            (await clients[tenant].release(tenant, model, 1, "client")).material()
        except Exception as error:  # noqa: BLE001 -- a failed release is a figure
            failures.append(type(error).__name__)
        else:
            taken.append(time.perf_counter() - arrival)

    try:
        # A connection per tenant is open, as a client's is that asks again and again.
        await asyncio.gather(*(client.get_model(tenant, "m0") for tenant, client in clients.items()))
        at = time.perf_counter() + 0.2
        async with asyncio.TaskGroup() as group:
            for tenant, model in asked:
                at += source.expovariate(rate)
                group.create_task(one(tenant, model, at))
    finally:
        for client in clients.values():
            await client.close()
    return summary(taken) | {"failed": len(failures), "kinds": sorted(set(failures))}


def cpu_seconds(pids: Sequence[int]) -> float:
    """Processor time of processes so far: for machines that are busy with something else."""
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return float(sum(each.user + each.system for each in times))


def main() -> None:
    """Prepare, measure, print."""
    end_as_interrupt()
    parser = argparse.ArgumentParser(description="Latency of releases under a steady load.")
    parser.add_argument("--vault", action="store_true", help="fail where PostgreSQL or Vault is missing")
    parser.add_argument("--keys", type=int, default=600, help="key versions, each released once per case")
    parser.add_argument("--rate", type=float, default=50.0, help="arrivals per second")
    parser.add_argument("--processes", type=int, default=1, help="of the service; one on SQLite")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with site(need_vault=options.vault) as place:
        platform_key = place.platform_key.read_text().strip()
        with place.process("prepare") as (url, _):
            secrets = prepare(url, platform_key, options.keys)
        with ExitStack() as ends:
            names = [f"measure-{number}" for number in range(options.processes)]
            urls, pids = zip(*(ends.enter_context(place.process(name)) for name in names), strict=True)
            result: dict[str, Any] = {"on": place.kind, "rate": options.rate, "processes": len(pids)}
            for seed, case in enumerate(("unwrapping", "cached")):
                busy = cpu_seconds(pids)
                result[case] = asyncio.run(measure(urls, secrets, options.keys, options.rate, seed))
                spent = (cpu_seconds(pids) - busy) / result[case]["calls"]
                result[case]["server_cpu_ms"] = round(spent * 1e3, 2)
            result["load"] = os.getloadavg()[0]
    for case, target in TARGET_MS.items():
        result[case]["target_p99_ms"] = target
        result[case]["met"] = result[case]["p99_ms"] <= target and not result[case]["failed"]
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
