"""What a running system tells, from every process, through the real collector into real Prometheus."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tempfile
from base64 import b64encode
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from tests.observability.system import (
    MEMBER,
    MODEL,
    QUICK,
    SLEEPER,
    TENANT,
    VOCAB,
    System,
    running_system,
)
from tests.servers.otelcol import Span
from tests.servers.promtool import rules

from anamorph import telemetry
from anamorph.client import Client
from anamorph.observability import DASHBOARDS

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(600)]

RULES = Path(str(files("anamorph.observability") / "alerts" / "serving.yaml"))
JOBS = {"anamorph-engine", "anamorph-door", "anamorph-keysvc", "anamorph-canary", "anamorph-client-test"}


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    # Ray's sockets lie below the home, and the names of sockets are limited.
    with tempfile.TemporaryDirectory(prefix="an-") as folder, running_system(Path(folder), [RULES]) as made:
        yield made


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    """Ids of seven digits: none of them is in a file by chance."""
    return [random.randrange(VOCAB // 2, VOCAB) for _ in range(12)]


@pytest.fixture(scope="module")
def traced(system: System, prompt: list[int]) -> list[Span]:
    """The trace of one request of a client, by the door to an engine without a route."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUICK.items():
            patch.setenv(name, value)
        observed = telemetry.setup("anamorph-client-test", otlp_endpoint=system.collector.url)
    metrics = telemetry.InferenceMetrics(observed.meter, TENANT, SLEEPER, "encrypted", side="client")
    with (
        Client(system.keysvc_url, system.api_key, TENANT, SLEEPER) as client,
        observed.tracer.start_as_current_span("chat") as span,
    ):
        timer = metrics.start()
        for chunk in client.stream(prompt, max_tokens=9):
            timer.token(sum(len(choice.token_ids) for choice in chunk.choices))
        timer.finish(input_tokens=len(prompt))
    with Client(system.keysvc_url, system.api_key, TENANT, MEMBER) as client:
        assert client.complete(prompt, max_tokens=2).choices
    trace = format(span.get_span_context().trace_id, "032x")
    found: list[Span] = system.collector.wait(lambda _: _whole(system, trace))
    observed.shutdown()
    return found


BUDGET = "AnamorphOverheadAboveBudget"
EXPECTED = {"chat", "door", "text_completion", "queue", "prefill", "decode"}


def _whole(system: System, trace: str) -> list[Span]:
    found = [span for span in system.collector.spans() if span.trace == trace]
    complete = {span.name for span in found} >= EXPECTED and any("release" in span.name for span in found)
    return found if complete else []


def named(spans: list[Span], name: str) -> Span:
    (found,) = [span for span in spans if span.name == name]
    return found


def test_one_trace_from_client_to_decode(traced: list[Span]) -> None:
    """Client, door and engine are one line of parents, and the engine's phases lie below its request."""
    client, door, engine = (named(traced, name) for name in ("chat", "door", "text_completion"))
    assert (door.parent, engine.parent) == (client.id, door.id)
    assert (door.service, engine.service) == ("anamorph-door", "anamorph-engine")
    queue, prefill, decode = (named(traced, name) for name in ("queue", "prefill", "decode"))
    assert {one.parent for one in (queue, prefill, decode)} == {engine.id}
    assert queue.ended == prefill.began
    assert prefill.ended == decode.began
    assert engine.attributes["anamorph.tenant"] == TENANT


def test_one_trace_from_client_to_key_service(traced: list[Span]) -> None:
    """The release of the key belongs to the same trace."""
    client = named(traced, "chat")
    released = [span for span in traced if "release" in span.name and span.service == "anamorph-keysvc"]
    assert released
    assert {span.parent for span in released} == {client.id}


def test_nothing_secret_arrives(system: System, traced: list[Span], prompt: list[int]) -> None:
    """Neither spans nor metrics hold a prompt's id, a credential or a key, and only listed attributes."""
    told = system.collector.text()
    assert traced[0].trace in told
    with Client(system.keysvc_url, system.api_key, TENANT, SLEEPER) as client:
        encrypted = client.lease().codec.encrypt(prompt)
    assert not [one for one in (*prompt, *encrypted) if re.search(rf"(?<!\d){one}(?!\d)", told)]
    secrets = [system.api_key, system.admin, system.platform_key.read_text().strip()]
    assert not [secret for secret in secrets if secret in told or b64encode(secret.encode()).decode() in told]
    attributes = {name for span in system.collector.spans() for name in span.attributes}
    assert attributes <= telemetry.guard.ALLOWED


def test_every_service_pushes(system: System, traced: list[Span]) -> None:
    """Engines, door, key service, canary and client: all arrive, and Prometheus has scraped them."""
    system.prometheus.wait(lambda p: {one["metric"].get("job") for one in p.query("target_info")} >= JOBS)
    assert traced


def expressions() -> list[tuple[str, str]]:
    return [(f"{d.name}: {p.title}", q.expr) for d in DASHBOARDS for p in d.panels for q in p.queries]


def selectors(expression: str) -> set[tuple[str, tuple[str, ...]]]:
    """Every metric of an expression, with the labels that are asked of it or that group it."""
    grouping = re.findall(r"\bby \(([^)]*)\)", expression)
    by = tuple(label for labels in grouping for label in labels.split(", "))
    bare = re.sub(r"\bby \([^)]*\)", "", expression)
    found = re.findall(r"(?<![\w\"])((?:anamorph|gen_ai)_\w+)(?:\{([^}]*)\})?(?!\w*\s*[=!])", bare)
    return {(name, (*by, *re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))) for name, matchers in found}


def test_selectors_are_found() -> None:
    """The parser of the tests below: metrics, matchers and grouping labels, and no label as a metric."""
    found = selectors('sum by (le, a_b) (rate(gen_ai_x{anamorph_t="1"}[5m])) / max(anamorph_y)')
    assert found == {("gen_ai_x", ("le", "a_b", "anamorph_t")), ("anamorph_y", ("le", "a_b"))}


# Labels that a series has only where something failed.
SOMETIMES = {"error_type", "anamorph_reason"}


def test_every_query_names_what_is_exported(system: System, traced: list[Span]) -> None:
    """Each metric of each panel and rule has been scraped, under this name and with these labels."""
    known: dict[str, set[str]] = {}

    def scraped(_: Any) -> bool:
        for one in system.prometheus.query('{__name__=~"(anamorph|gen_ai)_.+"}'):
            known.setdefault(one["metric"]["__name__"], set()).update(one["metric"])
        return set(asked) <= set(known)

    asking = [expression for _, expression in expressions()] + [rule["expr"] for rule in rules(RULES)]
    wanted = [selector for expression in asking for selector in selectors(expression)]
    asked = {name for name, _ in wanted}
    assert len(asked) > 25
    try:
        system.prometheus.wait(scraped)
    except AssertionError:
        pytest.fail(f"no process exports {sorted(asked - set(known))}")
    assert not [
        (name, label) for name, labels in wanted for label in labels if label not in known[name] | SOMETIMES
    ]
    assert traced


@pytest.mark.parametrize(("panel", "expression"), expressions())
def test_prometheus_takes_every_query(system: System, panel: str, expression: str) -> None:
    """With Grafana's variables filled in, no query is refused."""
    filled = expression.replace("$__rate_interval", "1m").replace("$tenant", ".*").replace("$model", ".*")
    assert "$" not in filled, panel
    system.prometheus.query(filled)


def test_prometheus_evaluates_the_rules(system: System) -> None:
    """The encrypted engine is twice as slow here: the rule about the budget sees it, and waits its time."""
    found = system.prometheus.wait(lambda p: [a for a in p.alerts() if a["labels"]["alertname"] == BUDGET])
    assert {alert["state"] for alert in found} == {"pending"}
    assert {alert["labels"]["anamorph_tenant"] for alert in found} == {TENANT}


def overhead(*options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "anamorph.cli", "overhead", *options],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_answer_of_the_canary(system: System) -> None:
    """`anamorph overhead --prometheus`: the ratio with its interval, of what is loaded anyway."""
    system.prometheus.wait(lambda p: p.query("anamorph_overhead_ratio"))
    url = system.prometheus.url
    (found,) = json.loads(overhead("--prometheus", url, "--json"))["items"]
    assert (found["tenant"], found["model"], found["version"]) == (TENANT, MODEL, "1")
    ratio = found["ratios"]["tpot"]
    assert 1 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert found["seconds"]["tpot"]["plaintext"] < found["seconds"]["tpot"]["encrypted"]
    assert f"{TENANT}/{MODEL}/v1" in overhead("--prometheus", url)


def test_the_answer_of_a_measurement(system: System) -> None:
    """`anamorph overhead`: the same, measured now."""
    place = ["--keysvc", system.keysvc_url, "--key-file", str(system.platform_key)]
    place += ["--serve-url", system.ray.serve_url, "--tenant", TENANT, "--model", MODEL]
    found = json.loads(overhead(*place, "--pairs=4", "--output-tokens=6", "--json"))
    assert found["pairs"] == 4
    assert found["ratios"]["tpot"]["median"] > 1


def test_the_answer_as_a_picture(system: System) -> None:
    """`anamorph overhead --plot`: the table, and bars of both sides with what was measured in the title."""
    place = ["--keysvc", system.keysvc_url, "--key-file", str(system.platform_key)]
    place += ["--serve-url", system.ray.serve_url, "--tenant", TENANT, "--model", MODEL]
    drawn = overhead(*place, "--pairs=2", "--output-tokens=4", "--plot")
    assert f"{MODEL}: medians of 2 pairs" in drawn
    bars = [line for line in drawn.splitlines() if "█" in line or "░" in line]
    assert {side for side in ("plaintext", "encrypted") if any(side in bar for bar in bars)} == {
        "plaintext",
        "encrypted",
    }


def test_the_sleeper_was_left_alone(system: System, traced: list[Span]) -> None:
    """The model that scales to zero has answered one request, the client's, and none of the canary's."""
    query = f'sum(gen_ai_server_request_duration_seconds_count{{gen_ai_request_model="{SLEEPER}"}})'
    (found,) = system.prometheus.wait(lambda p: p.query(query))
    assert found["value"][1] == "1"
    assert traced


def test_the_canary_ends_when_told(system: System) -> None:
    """SIGTERM ends it within a request, in order."""
    assert system.canary is not None
    child = system.canary._child
    system.canary.stop()
    assert child is not None
    assert child.returncode == 0
