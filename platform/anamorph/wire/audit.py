"""The audit log's hash chain: pure functions shared by the key service and whoever verifies it.

Each tenant has one chain. A row's digest covers every other field of the row and,
through ``previous``, all rows before it, so an edit, deletion, insertion or
reordering shows at the first row that it touches. Rows cut off the end, and a chain
computed anew, show only against a checkpoint kept outside the database
(``anamorph.wire.checkpoints``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from anamorph.wire.admin import AuditRead

DOMAIN = b"anamorph-audit/1\n"
FIRST_SEQUENCE = 1
# What the first row of a chain names as its predecessor.
GENESIS = "0" * 64

OTHER_ROW = "the row is not the one that the checkpoint was taken of"

_MAX_INTEGER = 2**53 - 1

Detail = Mapping[str, str | int | None]


@dataclass(frozen=True)
class Checkpoint:
    """The end of a chain at some moment; exported, it pins every row up to it."""

    sequence: int
    digest: str


@dataclass(frozen=True)
class Break:
    """The first row at which a chain does not hold, and why."""

    sequence: int
    reason: str


START = Checkpoint(FIRST_SEQUENCE - 1, GENESIS)


def next_row(
    head: Checkpoint, *, tenant: str, at: datetime, actor: str, action: str, subject: str, detail: Detail
) -> AuditRead:
    """The row that follows ``head``; ``START`` is the head of an empty chain.

    ``at`` is an aware time. The other fields are those of ``AuditRead``.

    Raises:
        ValueError: a field has no canonical form: a naive time, an integer beyond
            2^53 - 1, or text that is not Unicode.
    """
    row = AuditRead(
        tenant=tenant,
        sequence=head.sequence + 1,
        at=at,
        actor=actor,
        action=action,
        subject=subject,
        detail=dict(detail),
        previous=head.digest,
        digest="",
    )
    return row.model_copy(update={"digest": row_digest(row)})


def row_digest(row: AuditRead) -> str:
    """SHA-256 over the canonical JSON of every field but ``digest``, in hexadecimal.

    Raises:
        ValueError: a field has no canonical form.
    """
    fields: dict[str, Any] = row.model_dump(exclude={"digest"})
    fields["at"] = canonical_time(row.at)
    return hashlib.sha256(DOMAIN + canonical_json(fields)).hexdigest()


def checkpoint_of(row: AuditRead) -> Checkpoint:
    """The checkpoint after ``row``."""
    return Checkpoint(row.sequence, row.digest)


def first_break(
    rows: Iterable[AuditRead], *, tenant: str, start: Checkpoint = START, until: Checkpoint | None = None
) -> Break | None:
    """The first place where ``rows`` are not one unbroken chain, or ``None`` if they are.

    Args:
        rows: consecutive rows in order, read from wherever they were stored.
        tenant: whose chain this should be.
        start: the row before the first of ``rows``; the beginning of the chain by default.
        until: a checkpoint that the rows must reach or pass through; without one,
            rows missing at the end cannot be seen.
    """
    head = start
    for step in heads(rows, tenant=tenant, start=start):
        if isinstance(step, Break):
            return step
        head = step
        if until is not None and head.sequence == until.sequence and head != until:
            return Break(head.sequence, OTHER_ROW)
    return cut_off(head, until) if until is not None else None


def heads(
    rows: Iterable[AuditRead], *, tenant: str, start: Checkpoint = START
) -> Iterator[Checkpoint | Break]:
    """The chain's head after each of ``rows``; a ``Break`` instead, and no more, at the first that fails."""
    head = start
    for row in rows:
        if reason := _fault(row, tenant, head):
            yield Break(head.sequence + 1, reason)
            return
        head = checkpoint_of(row)
        yield head


def cut_off(head: Checkpoint, until: Checkpoint) -> Break | None:
    """The break of a chain that ends at ``head`` although a checkpoint was taken later, at ``until``."""
    if head.sequence >= until.sequence:
        return None
    return Break(head.sequence + 1, f"missing: the checkpoint was taken at row {until.sequence}")


def _fault(row: AuditRead, tenant: str, head: Checkpoint) -> str | None:
    if row.sequence != head.sequence + 1:
        return f"row {row.sequence} stands where row {head.sequence + 1} should"
    if row.tenant != tenant:
        return "the row belongs to another tenant's chain"
    if row.previous != head.digest:
        return "the row does not follow from the one before it"
    try:
        expected = row_digest(row)
    except ValueError as error:
        return f"the row has no canonical form: {error}"
    return None if row.digest == expected else "the row's content does not give its digest"


def canonical_json(value: Mapping[str, Any]) -> bytes:
    """RFC 8785 JSON of an object of strings, integers, nulls and such objects, as UTF-8.

    Raises:
        ValueError: any other value, an integer beyond ±(2^53 - 1), or text that is not Unicode.
    """
    text = json.dumps(_ordered(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8")


def _ordered(value: Any) -> Any:
    if isinstance(value, Mapping):
        # RFC 8785 sorts by UTF-16 code units, which differs from Python's order beyond U+FFFF.
        return {key: _ordered(value[key]) for key in sorted(value, key=lambda key: key.encode("utf-16-be"))}
    if value is None or isinstance(value, str):
        return value
    if type(value) is int and abs(value) <= _MAX_INTEGER:
        return value
    raise ValueError(f"{type(value).__name__} value outside the canonical form")


def canonical_time(at: datetime) -> str:
    """``at`` in UTC as ``YYYY-MM-DDTHH:MM:SS.ffffffZ``.

    Raises:
        ValueError: a time without a zone.
    """
    if at.tzinfo is None:
        raise ValueError("a time without a zone; audit rows are in UTC")
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
