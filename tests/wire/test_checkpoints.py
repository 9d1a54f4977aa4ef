"""Signed checkpoints: the format, and that no damage to a log or a checkpoint passes unseen."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import assume, given
from hypothesis import strategies as st

from anamorph.errors import AuditRefused, InvalidId, InvalidKey
from anamorph.wire.admin import AuditRead
from anamorph.wire.audit import START, Checkpoint, checkpoint_of, next_row, row_digest
from anamorph.wire.checkpoints import (
    SignedCheckpoint,
    Verdict,
    decode,
    encode,
    object_name,
    read_public_keys,
    signed_bytes,
    verify_log,
)

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
PUBLIC = {3: KEY.public_key().public_bytes_raw(), 4: OTHER.public_key().public_bytes_raw()}
ROWS = 6


def sign(
    head: Checkpoint,
    *,
    tenant: str = "acme",
    key: Ed25519PrivateKey = KEY,
    version: int = 3,
    at: datetime = NOON,
) -> SignedCheckpoint:
    signature = b64encode(key.sign(signed_bytes(tenant, head, at))).decode()
    fields: dict[str, Any] = {"sequence": head.sequence, "digest": head.digest}
    return SignedCheckpoint(tenant=tenant, at=at, key_version=version, signature=signature, **fields)


def log(count: int = ROWS, tenant: str = "acme", actor: str = "ann") -> list[AuditRead]:
    head, rows = START, []
    for number in range(count):
        row = next_row(
            head,
            tenant=tenant,
            at=NOON + timedelta(seconds=number),
            actor=actor,
            action="rotate",
            subject=f"s{number}",
            detail={"n": number},
        )
        rows.append(row)
        head = checkpoint_of(row)
    return rows


def pinned(rows: Sequence[AuditRead], *numbers: int) -> list[SignedCheckpoint]:
    """Checkpoints of the rows with these numbers; of the last one, without."""
    return [sign(checkpoint_of(rows[number - 1])) for number in numbers or (len(rows),)]


def verdict(rows: Sequence[AuditRead], checkpoints: Sequence[SignedCheckpoint]) -> Verdict:
    return verify_log(rows, checkpoints, PUBLIC, "acme")


def reforged(rows: Sequence[AuditRead]) -> list[AuditRead]:
    """The chain that somebody who owns the database computes to make ``rows`` hold."""
    head, forged = START, []
    for row in rows:
        draft = row.model_copy(update={"sequence": head.sequence + 1, "previous": head.digest})
        forged.append(draft.model_copy(update={"digest": row_digest(draft)}))
        head = checkpoint_of(forged[-1])
    return forged


def test_the_signed_bytes_are_these() -> None:
    """The encoding is fixed to the byte, with its format's name in front (docs/spec/audit.md)."""
    message = signed_bytes("acme", Checkpoint(7, "ab" * 32), NOON)
    expected = (
        b"\0\0\0\x15anamorph-checkpoint/1" + b"\0\0\0\x04acme" + b"\0\0\0\x017" + b"\0\0\0\x40" + b"ab" * 32
    )
    assert message == expected + b"\0\0\0\x1b2026-01-01T12:00:00.000000Z"
    assert KEY.sign(message).hex() == (
        "fb91e281e89b95962e171ee1ac9be19e700fdc58aecf9e1fd0fb39c094680f7e"
        "a44dec7f4c7d7436ba04ae651fa734676e28dfb17a274b7c651e41010dbca200"
    )


@pytest.mark.parametrize("covered", range(ROWS + 1))
def test_a_whole_log_is_intact_and_says_what_is_uncovered(covered: int) -> None:
    """Rows after the last checkpoint are no break; how many there are is told."""
    rows = log()
    found = verdict(rows, pinned(rows, covered) if covered else [])
    assert found.intact
    assert (found.covered, found.uncovered) == (covered, ROWS - covered)
    assert found.head == checkpoint_of(rows[-1])


@st.composite
def changed_fields(draw: st.DrawFn) -> tuple[str, Any]:
    texts = st.text(st.characters(codec="utf-8"), max_size=8)
    digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
    values: dict[str, st.SearchStrategy[Any]] = {
        **dict.fromkeys(("tenant", "actor", "action", "subject"), texts),
        **dict.fromkeys(("previous", "digest"), digests | texts),
        "sequence": st.integers(-1, 2**53),
        "at": st.datetimes(timezones=st.just(UTC)),
        "detail": st.dictionaries(texts, st.none() | texts | st.integers(-9, 9), max_size=2),
    }
    field = draw(st.sampled_from(sorted(values)))
    return field, draw(values[field])


@given(st.integers(0, ROWS - 1), changed_fields())
def test_a_changed_field_is_detected_at_its_row(index: int, change: tuple[str, Any]) -> None:
    """Whichever field of whichever row is edited, that row is named, checkpoint or not."""
    rows = log()
    field, value = change
    assume(getattr(rows[index], field) != value)
    rows[index] = rows[index].model_copy(update={field: value})
    found = verdict(rows, [])
    assert found.broken is not None
    assert found.broken.sequence == index + 1


@given(st.permutations(range(ROWS)))
def test_another_order_is_detected(order: list[int]) -> None:
    """Only the order in which rows were written holds."""
    rows = log()
    assert verdict([rows[index] for index in order], []).intact == (order == sorted(order))


@given(st.sets(st.integers(0, ROWS - 1), min_size=1))
def test_any_dropped_rows_are_detected(dropped: set[int]) -> None:
    """Rows missing at the start, in between or at the end: the first is named."""
    rows = log()
    kept = [row for index, row in enumerate(rows) if index not in dropped]
    found = verdict(kept, pinned(rows))
    assert found.broken is not None
    assert found.broken.sequence == min(dropped) + 1


@given(st.integers(0, ROWS - 1), st.integers(1, ROWS))
def test_a_chain_computed_anew_is_detected_as_far_as_it_is_covered(edited: int, covered: int) -> None:
    """An owner of the database can make an edit hold; not before a checkpoint."""
    rows = log()
    original = list(rows)
    rows[edited] = rows[edited].model_copy(update={"actor": "mallory"})
    assert verdict(reforged(rows), []).intact
    assert verdict(reforged(rows), pinned(original, covered)).intact == (covered <= edited)


@given(st.integers(0, ROWS - 1))
def test_an_inserted_row_is_detected(place: int) -> None:
    """A foreign row before the last checkpoint breaks the log, even in a chain computed anew."""
    rows = log()
    longer = reforged([*rows[:place], log(1, actor="mallory")[0], *rows[place:]])
    assert not verdict(longer, pinned(rows)).intact


FORGERIES: dict[str, dict[str, Any]] = {
    "sequence": {"sequence": ROWS - 1},
    "digest": {"digest": "0" * 64},
    "at": {"at": NOON + timedelta(microseconds=1)},
    "key version": {"key_version": 4},
    "unknown key": {"key_version": 5},
    "no signature": {"signature": "AAAA"},
    "other tenant": {"tenant": "globex"},
}


@pytest.mark.parametrize("changes", FORGERIES.values(), ids=FORGERIES)
def test_a_forged_checkpoint_is_refused_and_covers_nothing(changes: dict[str, Any]) -> None:
    """Whatever is changed in a checkpoint, it is named, and the log is not intact by its word."""
    rows = log()
    found = verdict(rows, [pinned(rows)[0].model_copy(update=changes)])
    assert not found.intact
    assert len(found.refused) == 1
    assert (found.broken, found.covered) == (None, 0)


@given(st.integers(0, 511))
def test_a_flipped_bit_of_a_signature_is_refused(bit: int) -> None:
    """A signature holds as it is, or not at all."""
    rows = log(1)
    signature = bytearray(KEY.sign(signed_bytes("acme", checkpoint_of(rows[0]), NOON)))
    signature[bit // 8] ^= 1 << bit % 8
    forged = pinned(rows)[0].model_copy(update={"signature": b64encode(signature).decode()})
    assert len(verdict(rows, [forged]).refused) == 1


def test_a_checkpoint_of_another_key_is_refused() -> None:
    """An own key of the forger's is none of ours, whatever version it claims."""
    rows = reforged([row.model_copy(update={"actor": "mallory"}) for row in log()])
    assert not verdict(rows, [sign(checkpoint_of(rows[-1]), key=OTHER, version=3)]).intact
    assert verdict(rows, [sign(checkpoint_of(rows[-1]), key=OTHER, version=4)]).intact


def test_another_tenants_checkpoint_is_refused() -> None:
    """A checkpoint that was signed for one tenant says nothing of another's log."""
    rows = log()
    foreign = sign(checkpoint_of(rows[-1]), tenant="globex")
    found = verdict(rows, [foreign])
    assert "another tenant" in found.refused[0].reason
    assert found.covered == 0


def test_two_checkpoints_of_one_row_that_disagree_break_the_log() -> None:
    """A chain that was forked and signed twice does not pass by its better half."""
    rows, fork = log(), log(actor="mallory")
    assert not verdict(rows, pinned(rows) + pinned(fork)).intact
    assert not verdict(fork, pinned(rows) + pinned(fork)).intact


def test_an_emptied_log_is_detected() -> None:
    """All rows gone is a break at the first."""
    rows = log()
    found = verdict([], pinned(rows))
    assert found.broken is not None
    assert found.broken.sequence == 1


@given(st.integers(1, 2**53 - 1), st.binary(min_size=32, max_size=32), st.datetimes(timezones=st.just(UTC)))
def test_a_checkpoint_survives_its_export(sequence: int, digest: bytes, at: datetime) -> None:
    """What is exported reads back as the same checkpoint, and still verifies."""
    made = sign(Checkpoint(sequence, digest.hex()), at=at)
    assert decode(encode(made)) == made
    decode(encode(made)).verify_signature(PUBLIC)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff", b"{" * 5000, encode(pinned(log())[0]).replace(b"}", b',"x":1}')]
)
def test_what_is_no_checkpoint_is_refused(content: bytes) -> None:
    """Damage on the way is one error, whatever it looks like."""
    with pytest.raises(AuditRefused, match="no checkpoint"):
        decode(content)


def test_names_of_objects_sort_as_the_chain_does() -> None:
    """A listing of a store is in the order of the rows, and a hostile tenant id gives no name."""
    names = [object_name("acme", sequence) for sequence in (9, 10, 2**53 - 1)]
    assert names == sorted(names)
    with pytest.raises(InvalidId):
        object_name("../acme", 1)


def test_public_keys_are_read_from_a_file() -> None:
    """Versions and raw keys."""
    text = json.dumps({"keys": {"3": b64encode(PUBLIC[3]).decode()}})
    assert read_public_keys(text) == {3: PUBLIC[3]}


@pytest.mark.parametrize(
    "text", ["", "{}", '{"keys": {}}', '{"keys": {"1": "AAAA"}}', '{"keys": {"x": "AAAA"}}', '{"keys": []}']
)
def test_what_is_no_file_of_public_keys_is_refused(text: str) -> None:
    """An anchor is whole or not there: a log is never verified against nothing."""
    with pytest.raises(InvalidKey):
        read_public_keys(text)
