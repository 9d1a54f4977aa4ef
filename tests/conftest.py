"""Real servers that tests of several folders share: each started when first asked for, and always stopped.

One of each per test process: with pytest-xdist each worker has its own, on ports and in folders of its own.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

# Imported where they are started: most runs of tests need none, nor the packages behind them.
if TYPE_CHECKING:
    from tests.servers.counting import Counting
    from tests.servers.postgres import PostgresServer
    from tests.servers.production import Production
    from tests.servers.proxies import Toxiproxy
    from tests.servers.s3 import Server
    from tests.servers.vault import VaultServer


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """PostgreSQL; a test makes databases of its own, by ``fresh`` or ``clone``, and leaves it running."""
    from tests.servers.postgres import running_postgres

    with running_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def vault_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VaultServer]:
    """Vault on raft storage with TLS and an audit device, unsealed; a test leaves it so."""
    from tests.servers.vault import running_vault

    with running_vault(tmp_path_factory.mktemp("vault")) as server:
        yield server


@pytest.fixture(scope="session")
def toxiproxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toxiproxy]:
    """A TCP fault proxy, by which a test makes as many faulty ports as it needs."""
    from tests.servers.proxies import running_toxiproxy

    with running_toxiproxy(tmp_path_factory.mktemp("toxiproxy")) as server:
        yield server


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An S3-compatible store."""
    from tests.servers.s3 import running_s3

    with running_s3(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture
def s3_port(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    """The store behind a counting port, which is what the environment names."""
    import s3fs
    from tests.servers.counting import counting

    upstream = urlsplit(s3_server.endpoint).port
    assert upstream is not None
    with counting(upstream) as made:
        for name, value in {**s3_server.environment, "AWS_ENDPOINT_URL_S3": made.url}.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield made


@pytest.fixture
def production(
    postgres_server: PostgresServer, vault_server: VaultServer, tmp_path: Path
) -> Iterator[Production]:
    """The key service with PostgreSQL and Vault, set up by its own commands; no process runs yet."""
    from tests.servers.production import running_production

    with running_production(tmp_path, postgres_server, vault_server) as made:
        yield made


def pytest_configure() -> None:
    """Children of the tests hear Ctrl-C: what a shell starts in the background inherits that it does not."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Marks of what changes a whole cluster.
ON_A_CLUSTER = {"cluster", "cluster_faults"}
# These measure time and memory, count processes, or start Ray: not two at once on two cores.
ALONE = ("checkpoint", "cli", "client", "docs", "pipeline", "serve", "system")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow and real tests of some folders get the machine to themselves; a whole cluster is asked for."""
    here = Path(__file__).parent
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if marks & {"slow", "real"} and item.path.relative_to(here).parts[0] in ALONE:
            item.add_marker(pytest.mark.alone)
    unasked = ON_A_CLUSTER - set(re.findall(r"\w+", config.option.markexpr or ""))
    theirs = [one for one in items if any(map(one.get_closest_marker, unasked))]
    config.hook.pytest_deselected(items=theirs)
    items[:] = [one for one in items if one not in theirs]
