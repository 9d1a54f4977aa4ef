"""The audit log's hash chain: whole chains hold, and every kind of damage is named."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anamorph.wire.admin import AuditRead
from anamorph.wire.audit import START, Break, Checkpoint, canonical_json, checkpoint_of, first_break, next_row

VECTORS = Path(__file__).parents[1] / "vectors"
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
DOCUMENT: dict[str, Any] = json.loads((VECTORS / "audit.json").read_text(encoding="utf-8"))

texts = st.text(st.characters(codec="utf-8"), max_size=8)
details = st.dictionaries(texts, st.none() | texts | st.integers(-(2**53) + 1, 2**53 - 1), max_size=3)


def chain(contents: list[dict[str, Any]]) -> list[AuditRead]:
    head, rows = START, []
    for number, detail in enumerate(contents):
        at = NOON + timedelta(seconds=number)
        row = next_row(
            head, tenant="acme", at=at, actor="a", action="rotate", subject=str(number), detail=detail
        )
        rows.append(row)
        head = checkpoint_of(row)
    return rows


def edited(rows: list[dict[str, Any]], edits: list[list[Any]]) -> list[AuditRead]:
    rows = [dict(row) for row in rows]
    for verb, index, *rest in edits:
        if verb == "set":
            rows[index][rest[0]] = rest[1]
        elif verb == "delete":
            del rows[index]
        elif verb == "insert":
            rows.insert(index, rest[0])
        else:
            rows[index], rows[rest[0]] = rows[rest[0]], rows[index]
    return [AuditRead.model_validate(row) for row in rows]


def test_vector_chain_holds() -> None:
    """The committed chain is whole and ends at its committed head."""
    rows = edited(DOCUMENT["rows"], [])
    assert first_break(rows, tenant="acme", until=Checkpoint(**DOCUMENT["head"])) is None


@pytest.mark.parametrize("case", DOCUMENT["broken"], ids=lambda case: case["why"])
def test_vector_damage_is_named(case: dict[str, Any]) -> None:
    """Each damaged chain of the vectors is reported at the first bad row."""
    until = Checkpoint(**case["until"]) if "until" in case else None
    found = first_break(edited(DOCUMENT["rows"], case["edits"]), tenant="acme", until=until)
    assert found is not None
    assert found.sequence == case["first"]


@pytest.mark.parametrize(("edits", "code"), [([], 0), ([["set", 0, "actor", "x"]], 1)])
def test_second_implementation(edits: list[Any], code: int, tmp_path: Path) -> None:
    """Plain Python without the project agrees with the vectors, and says so when they are altered."""
    rows = [row.model_dump(mode="json") for row in edited(DOCUMENT["rows"], edits)]
    (tmp_path / "audit.json").write_text(json.dumps({**DOCUMENT, "rows": rows}))
    command = [sys.executable, "-I", "-S", str(VECTORS / "verify_audit.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (code, "")


@given(st.lists(details, max_size=4))
def test_chain_survives_transport(contents: list[dict[str, Any]]) -> None:
    """A chain holds after a round trip through JSON, whatever its details say."""
    rows = [AuditRead.model_validate_json(row.model_dump_json()) for row in chain(contents)]
    assert first_break(rows, tenant="acme") is None


@given(st.lists(details, min_size=2, max_size=4), st.data())
def test_any_missing_row_is_found(contents: list[dict[str, Any]], data: st.DataObject) -> None:
    """Whichever row is missing before the end, the break is reported in its place."""
    rows = chain(contents)
    missing = data.draw(st.integers(0, len(rows) - 2))
    found = first_break(rows[:missing] + rows[missing + 1 :], tenant="acme")
    assert found is not None
    assert found.sequence == missing + 1


@given(details, details)
def test_canonical_json_is_injective(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Objects have the same canonical form exactly when they are equal, and it reads back."""
    assert (canonical_json(one) == canonical_json(other)) == (one == other)
    assert json.loads(canonical_json(one)) == one


def test_truncation_needs_a_checkpoint() -> None:
    """Rows missing at the end are seen with a checkpoint, and only with one."""
    rows = chain([{}, {}, {}])
    assert first_break(rows[:2], tenant="acme") is None
    assert first_break(rows[:2], tenant="acme", until=checkpoint_of(rows[2])) == Break(
        3, "missing: the checkpoint was taken at row 3"
    )


def test_verification_can_start_in_the_middle() -> None:
    """A page of rows verifies from the checkpoint before it, and from no other."""
    rows = chain([{}, {}, {}])
    assert first_break(rows[1:], tenant="acme", start=checkpoint_of(rows[0])) is None
    assert first_break(rows[1:], tenant="acme", start=Checkpoint(1, "f" * 64)) is not None


def test_rows_after_a_checkpoint_are_fine() -> None:
    """A chain may have grown since the checkpoint was taken."""
    rows = chain([{}, {}, {}])
    assert first_break(rows, tenant="acme", until=checkpoint_of(rows[1])) is None


def test_empty_chain_holds() -> None:
    """No rows are a whole chain."""
    assert first_break([], tenant="acme") is None


def test_time_zone_does_not_matter() -> None:
    """The same moment in another zone gives the same digest."""
    fields: dict[str, Any] = {"tenant": "t", "actor": "a", "action": "b", "subject": "c", "detail": {}}
    elsewhere = NOON.astimezone(timezone(timedelta(hours=-7)))
    assert next_row(START, at=NOON, **fields).digest == next_row(START, at=elsewhere, **fields).digest


@pytest.mark.parametrize("detail", [{"n": 2**53}, {"n": -(2**53)}, {"s": "\ud800"}, {"\udfff": None}])
def test_no_canonical_form_is_refused(detail: dict[str, Any]) -> None:
    """An integer that other readers would round, or text that is not Unicode, never enters the chain."""
    with pytest.raises(ValueError):  # noqa: PT011  pydantic, UnicodeEncodeError and our own are all ValueErrors
        next_row(START, tenant="t", at=NOON, actor="a", action="b", subject="c", detail=detail)


def test_naive_time_is_refused() -> None:
    """A time without a zone is refused, not taken for UTC."""
    naive = NOON.replace(tzinfo=None)
    with pytest.raises(ValueError, match="without a zone"):
        next_row(START, tenant="t", at=naive, actor="a", action="b", subject="c", detail={})


def test_row_without_canonical_form_is_a_break() -> None:
    """A stored row whose time lost its zone is named as the bad row; verification does not crash."""
    rows = [row.model_copy(update={"at": row.at.replace(tzinfo=None)}) for row in chain([{}])]
    found = first_break(rows, tenant="acme")
    assert found is not None
    assert "without a zone" in found.reason
