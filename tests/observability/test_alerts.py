"""The alerting rules of serving and canary, judged by Prometheus' own tool."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from tests.observability.cases import BROKEN, CASES, door
from tests.servers.promtool import judge, promtool, rules, unit, units

RULES = Path(str(files("anamorph.observability") / "alerts" / "serving.yaml"))
GUIDE = Path(__file__).parents[2] / "docs" / "observability.md"


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
def test_no_canary_is_a_silent_one(tmp_path: Path) -> None:
    """Where its series are not there at all, the alert fires too."""
    judge(RULES, tmp_path, [unit("CanarySilent", {"up": "1x240"}, [{}])])


@pytest.mark.real
@pytest.mark.parametrize(
    ("begun", "broken", "expected"), [("0+100x240", "0+3x240", [{}]), ("0+200x240", "0+1x240", [])]
)
def test_answers_that_break_off_at_the_door_count(
    tmp_path: Path, begun: str, broken: str, expected: list[dict[str, str]]
) -> None:
    """They have begun with a 200: three in a hundred fire, one in two hundred does not."""
    judge(RULES, tmp_path, [unit("DoorErrors", {door(200): begun, BROKEN: broken}, expected)])


@pytest.mark.real
def test_the_judge_can_fail(tmp_path: Path) -> None:
    """The positive control: a firing alert that is said to be silent is a failure."""
    with pytest.raises(AssertionError, match="FAILED"):
        judge(RULES, tmp_path, [unit("DrainStuck", CASES["DrainStuck"].fires, [])])


@pytest.mark.parametrize("rule", rules(RULES), ids=lambda rule: rule["alert"])
def test_each_says_what_to_do(rule: dict[str, Any]) -> None:
    """Severity, summary, description, and a runbook that exists."""
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert {"summary", "description", "runbook"} == rule["annotations"].keys()
    place, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert place == GUIDE.name
    assert f"### {rule['alert']}\n" in GUIDE.read_text()
    assert anchor == rule["alert"].lower()
