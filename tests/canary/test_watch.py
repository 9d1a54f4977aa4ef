"""The continuous canary before a real key service and engines on real sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.client.stack import Stack, faulty, keysvc_home_in, wait_until

from anamorph import telemetry
from anamorph.canary import Baselines, Watch, WatchSettings
from anamorph.canary.window import LEAST_PAIRS
from anamorph.serve.api.endpoint import Endpoint
from anamorph.serve.engines.fake import FakeEngine
from anamorph.wire.completions import stream
from anamorph.wire.serving import EngineSettings, KeyState, route_prefix

VOCAB = 400
TOKENIZER = cast("Any", SimpleNamespace(size=VOCAB, digest="sha256:" + "0" * 64, chat_template_digest=None))
SETTINGS = WatchSettings(every_s=0.01, lengths=(4, 12), output_tokens=5, refresh_s=0)


class World:
    """A stack with a baseline, and a canary that looks at it."""

    def __init__(self, stack: Stack, http: httpx.Client, observed: telemetry.Telemetry) -> None:
        self.stack, self.http, self.observed = stack, http, observed
        self.serve = stack._cluster.url
        self.watch = Watch(stack.platform, http, Baselines(self.serve), observed, SETTINGS)

    def add_baseline(self) -> None:
        settings = EngineSettings(
            tenant="plaintext",
            model=self.stack.model,
            version=0,
            protection="plaintext",
            replica="fake:",
            engine="fake",
            context_length=4096,
        )
        endpoint = self.stack.engines.add(settings, FakeEngine("plaintext", vocab_size=VOCAB))
        endpoint.reconfigure(KeyState(jwks=self.stack.platform.inference_keys().keys))

    def turns(self, count: int) -> None:
        for _ in range(count):
            self.watch.turn()

    def plaintext(self) -> Endpoint:
        return self.stack.engines.endpoints[route_prefix("plaintext", self.stack.model, 0)]

    def metric(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """Values above zero of one metric, by the values of ``labels``."""
        families = text_string_to_metric_families(self.observed.prometheus().decode())
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        found = {tuple(one.labels.get(label, "") for label in labels): one.value for one in samples}
        return {key: value for key, value in found.items() if value}

    @property
    def pairs(self) -> float:
        return self.metric("anamorph_canary_pairs_total", "error_type").get(("",), 0)

    @property
    def skipped(self) -> dict[tuple[str, ...], float]:
        return self.metric("anamorph_canary_skipped_total", "anamorph_reason")


Make = Callable[..., World]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes a world; keyword arguments are fields of the model's record."""
    with ExitStack() as stays:

        def world(*, delay_s: float = 0, **record: Any) -> World:
            stack = stays.enter_context(Stack(keysvc_home_in(tmp_path), TOKENIZER, faulty))
            stack.register(**record)
            stays.callback(stack.admin.close)
            stack.rotate(delay_s=delay_s)
            observed = telemetry.build("canary-test")
            stays.callback(observed.shutdown)
            made = World(stack, stays.enter_context(httpx.Client(timeout=30)), observed)
            made.add_baseline()
            return made

        yield world


def tokens(endpoint: Endpoint) -> int:
    """Ids that an engine's endpoint moved: what a token budget counts."""
    return endpoint.admission.usage().tokens


def test_pairs_become_a_ratio(make: Make) -> None:
    """After ten pairs there are ratios with their intervals, and before there are none."""
    world = make()
    world.turns(LEAST_PAIRS - 1)
    assert world.metric("anamorph_overhead_ratio", "anamorph_measure") == {}
    world.turns(1)
    found = world.metric("anamorph_overhead_ratio", "anamorph_measure", "anamorph_statistic")
    assert {measure for measure, _ in found} == {"ttft", "tpot", "e2el", "throughput"}
    assert all(found[m, "low"] <= found[m, "median"] <= found[m, "high"] for m, _ in found)
    assert b"anamorph_overhead_drift{" in world.observed.prometheus()


def test_its_volume_is_counted(make: Make) -> None:
    """What it sends and gets counts towards the budget, and it says itself how much that is."""
    world = make()
    world.turns(4)
    sent = 2 * (4 + 5) + 2 * (12 + 5)
    assert tokens(world.stack.endpoint(1)) == tokens(world.plaintext()) == sent
    assert world.metric("anamorph_canary_tokens_total") == {(): 2 * sent}


def test_busy_versions_wait(make: Make) -> None:
    """While somebody else's request is being answered there, nothing is measured."""
    world = make(delay_s=0.02)
    stack = world.stack
    version = stack.platform.get_version(stack.tenant, stack.model, 1)
    token = stack.platform.inference_token(stack.tenant, stack.model).token
    request = {"prompt": [1, 2], "max_tokens": 500}
    answer = stream(world.http, version.endpoint or "", request, token=token, key_id=version.key_id)
    next(answer)
    world.turns(2)
    answer.close()
    assert (world.pairs, world.skipped) == (0, {("busy",): 2})
    assert tokens(world.plaintext()) == 0
    wait_until(lambda: stack.endpoint(1).admission.usage().in_flight == 0)
    world.turns(1)
    assert world.pairs == 1


def test_disturbed_pairs_do_not_count(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that was answered during the pair shows in the count of ids, and the pair is dropped."""
    world = make()
    admission = world.plaintext().admission
    count = admission.count
    monkeypatch.setattr(admission, "count", lambda n: count(n + 1))
    world.turns(2)
    assert (world.pairs, world.skipped) == (0, {("disturbed",): 2})


@pytest.mark.parametrize(
    ("serving", "reason"),
    [
        ({"autoscaling": {"min_replicas": 0, "max_replicas": 1}}, "scales_to_zero"),
        ({"placement": "shared", "pool": "p"}, "shared"),
    ],
)
def test_nothing_is_woken_or_held(make: Make, serving: dict[str, Any], reason: str) -> None:
    """A model that may leave its device or its slot never hears of the canary."""
    world = make(serving=serving)
    seen = len(world.stack.engines.seen)
    world.turns(3)
    assert len(world.stack.engines.seen) == seen
    assert world.skipped == {(reason,): 3}


def test_without_a_baseline(make: Make) -> None:
    """Without one to compare with, the encrypted endpoint is not asked for a token."""
    world = make()
    world.stack.engines.apps.pop(route_prefix("plaintext", world.stack.model, 0))
    world.turns(2)
    assert world.skipped == {("unreachable",): 2}
    assert tokens(world.stack.endpoint(1)) == 0


def test_it_moves_with_a_rotation(make: Make) -> None:
    """The new version is measured from nothing, the old one's series end, the history of the cost stays."""
    world = make()
    world.turns(LEAST_PAIRS)
    history = world.watch.ledger.kept()[0].drifts
    world.stack.rotate()
    before = tokens(world.stack.endpoint(1))
    world.turns(LEAST_PAIRS)
    assert tokens(world.stack.endpoint(1)) == before
    assert set(world.metric("anamorph_overhead_pairs", "anamorph_version")) == {("2",)}
    assert world.watch.ledger.kept()[0].drifts is history


def test_failures_are_counted_and_survived(make: Make) -> None:
    """An engine that fails, then a key service that does not answer: it goes on, and says what it was."""
    world = make()
    world.turns(1)
    world.stack.endpoint(1).engine.fails = True  # type: ignore[attr-defined]
    world.turns(1)
    world.stack.endpoint(1).engine.fails = False  # type: ignore[attr-defined]
    world.turns(1)
    assert world.pairs == 2
    world.stack.stop_keysvc()
    world.turns(1)
    failed = set(world.metric("anamorph_canary_pairs_total", "error_type")) - {("",)}
    assert failed == {("unavailable",), ("no_answer",)}


def test_it_stops_when_told(make: Make) -> None:
    """Within a pair of being told, whatever pause it is in."""
    world, stop = make(), threading.Event()
    runner = threading.Thread(target=world.watch.run, args=[stop])
    runner.start()
    wait_until(lambda: world.pairs >= 3)
    stop.set()
    runner.join(30)
    assert not runner.is_alive()
