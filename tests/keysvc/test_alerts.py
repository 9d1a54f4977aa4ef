"""The alerting rules, judged by Prometheus' own tool, and what they are made of by the running app."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.keysvc.alerts import CASES
from tests.keysvc.conftest import World
from tests.servers.promtool import judge, promtool, rules, unit, units

from anamorph import errors
from anamorph.wire.admin import Role
from anamorph_keysvc.app import build_app
from anamorph_keysvc.observe import Observer, build_observer
from anamorph_keysvc.service.transition import PHASES

RULES = Path(str(files("anamorph_keysvc") / "alerts" / "keysvc.yaml"))
ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "observability.md"


@pytest.mark.real
def test_prometheus_takes_the_rules(tmp_path: Path) -> None:
    """Expressions, durations and templates are well formed."""
    promtool("check", "rules", str(RULES), cwd=tmp_path)


def test_every_alert_has_its_case() -> None:
    """None goes untested."""
    assert {f"Anamorph{name}" for name in CASES} == {rule["alert"] for rule in rules(RULES)}
    assert [name for name, case in CASES.items() if not case.silent] == []


@pytest.mark.real
@pytest.mark.parametrize("alert", CASES)
def test_it_fires_then_and_only_then(tmp_path: Path, alert: str) -> None:
    """Under the conditions it is for, with the labels that say where; not under near but healthy ones."""
    judge(RULES, tmp_path, units(alert, CASES[alert]))


@pytest.mark.real
def test_the_judge_can_fail(tmp_path: Path) -> None:
    """The positive control: a firing alert that is said to be silent is a failure, and the reverse."""
    case = CASES["KeyOverdue"]
    for wrong in (unit("KeyOverdue", case.fires, []), unit("KeyOverdue", case.silent[0], [{}])):
        with pytest.raises(AssertionError, match="FAILED"):
            judge(RULES, tmp_path, [wrong])


# What the rules are made of


def selectors(expression: str) -> list[tuple[str, list[str]]]:
    """Every metric of an expression, with the labels that are asked of it."""
    found = re.findall(r"\b(anamorph_keysvc_\w+)(?:\{([^}]*)\})?", expression)
    return [(name, re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) for name, matchers in found]


def exported(page: str) -> dict[str, set[str]]:
    """Names on a Prometheus page with the labels that they have."""
    known: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            known.setdefault(sample.name, set()).update(sample.labels)
    return known


async def lived(world: World) -> str:
    """The metrics page of an app that has answered, released, refused, and worked in the background."""
    observer = build_observer(world.measured, world.service.database, clock=world.clock, checkpoints=True)
    world.app = build_app(world.service, world.measured, observer)
    world.model()
    version = world.active()
    async with world.client(Role.CLIENT) as client, world.http() as http:
        await client.release("acme", "chat", version, "client")
        with pytest.raises(errors.NotFound):
            await client.release("acme", "chat", 99, "client")
        await http.get("/readyz")
        _fail(observer)
        return (await http.get("/metrics")).text


def _fail(observer: Observer) -> None:
    with pytest.raises(errors.Unavailable), observer.call("kms", "check"):
        raise errors.Unavailable("sealed", code="kms_sealed")
    observer.observe("login_issuer", "failed")
    observer.round("checkpoints", "AuditRefused")


async def test_every_metric_and_label_of_the_rules_is_exported(world: World) -> None:
    """A rule about a metric that does not exist would be silent for ever."""
    known = exported(await lived(world))
    asked = [selector for rule in rules(RULES) for selector in selectors(rule["expr"])]
    assert len(asked) >= len(rules(RULES))
    assert {name for name, _ in asked} - set(known) == set()
    assert [(name, label) for name, labels in asked for label in labels if label not in known[name]] == []


def test_every_word_of_the_rules_is_one_that_the_service_says() -> None:
    """Codes of errors, phases and kinds are spelt in the rules as in the code."""
    sources = "\n".join(path.read_text() for path in (ROOT / "keysvc").rglob("*.py"))
    sources += (ROOT / "platform/anamorph/errors.py").read_text()
    words = re.findall(
        r'(?:error_type|anamorph_kind|anamorph_phase)\s*(?:=~?|!=)\s*"([^"]+)"', RULES.read_text()
    )
    spoken = {word for listed in words for word in listed.split("|")}
    assert {"kms_sealed", "kms_unavailable", "timeout", "pending", "kms"} <= spoken
    assert [word for word in spoken if not re.search(rf"\b{word}\b", sources) and word not in PHASES] == []


def test_every_alert_says_what_to_do() -> None:
    """Summary, description, severity, and a section of the guide under its own name."""
    headings = set(re.findall(r"^### (\w+)$", GUIDE.read_text(), flags=re.MULTILINE))
    for rule in rules(RULES):
        notes, name = rule["annotations"], rule["alert"]
        assert notes["summary"]
        assert notes["description"]
        assert notes["runbook"] == f"observability.md#{name.lower()}"
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert name in headings
