"""Signed checkpoints of audit chains, kept outside the database, and verification against them.

A checkpoint says that a tenant's chain had a certain row at a certain number. Whoever
can rewrite the whole database can compute a chain that holds; it cannot sign the
checkpoints that go with it, nor take back those exported before. The format is
docs/spec/audit.md, shared by the key service, which signs, and whoever verifies.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import AwareDatetime, Field, ValidationError

from anamorph.errors import AuditRefused, InvalidKey
from anamorph.wire.admin import AuditRead, Base64, Message
from anamorph.wire.audit import OTHER_ROW, START, Break, Checkpoint, canonical_time, cut_off, heads
from anamorph.wire.ids import Label, check_label

FORMAT: Final = "anamorph-checkpoint/1"
KEYS_FORMAT: Final = "anamorph-checkpoint-keys/1"
PUBLIC_KEY_BYTES = 32
MAX_BYTES = 4096

Sequence = Annotated[int, Field(ge=1, le=2**53 - 1)]
KeyVersion = Annotated[int, Field(ge=1)]


class SignedCheckpoint(Message):
    """Row ``sequence`` of a tenant's chain had ``digest`` at the time ``at``; signed with Ed25519.

    ``key_version`` says which public key verifies. The signature does not cover it: the
    key-management service picks the version while it signs, and under any other
    version's key the signature does not hold.
    """

    format: Literal["anamorph-checkpoint/1"] = FORMAT
    tenant: Label
    sequence: Sequence
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    at: AwareDatetime
    key_version: KeyVersion
    signature: Base64

    @property
    def head(self) -> Checkpoint:
        """The row that it pins."""
        return Checkpoint(self.sequence, self.digest)

    def verify_signature(self, public_keys: Mapping[int, bytes]) -> None:
        """Return if the signature holds under the public key of its version.

        Args:
            public_keys: raw Ed25519 keys (32 bytes) by version, from a source that whoever
                keeps the checkpoints does not control.

        Raises:
            AuditRefused: it does not hold, or there is no key of its version.
        """
        raw = public_keys.get(self.key_version)
        if raw is None:
            raise AuditRefused(f"there is no public key of version {self.key_version}")
        message = signed_bytes(self.tenant, self.head, self.at)
        try:
            Ed25519PublicKey.from_public_bytes(raw).verify(b64decode(self.signature), message)
        except (InvalidSignature, ValueError):
            raise AuditRefused("the signature does not hold") from None


def signed_bytes(tenant: str, head: Checkpoint, at: AwareDatetime) -> bytes:
    """What is signed: each field as UTF-8 text, preceded by its length in 4 bytes, big-endian.

    The first is the format's name, which no other message signed with this key begins with.

    Raises:
        ValueError: ``at`` has no zone.
    """
    fields = (FORMAT, tenant, str(head.sequence), head.digest, canonical_time(at))
    encoded = [field.encode() for field in fields]
    return b"".join(len(field).to_bytes(4, "big") + field for field in encoded)


def object_name(tenant: str, sequence: int) -> str:
    """Where a checkpoint lies below the root of an export; names sort as the chain does.

    Raises:
        InvalidId: ``tenant`` is not a tenant id.
    """
    return f"{check_label(tenant)}/{sequence:016d}.json"


def encode(checkpoint: SignedCheckpoint) -> bytes:
    """The exported object: one JSON object and a line feed."""
    return checkpoint.model_dump_json().encode() + b"\n"


def decode(content: bytes) -> SignedCheckpoint:
    """Read an exported object. Its signature is not looked at.

    Raises:
        AuditRefused: not a checkpoint.
    """
    if len(content) > MAX_BYTES:
        raise AuditRefused("this is no checkpoint: it is too long")
    try:
        return SignedCheckpoint.model_validate_json(content)
    except ValidationError:
        raise AuditRefused(f"this is no checkpoint of format {FORMAT}") from None


class CheckpointKeys(Message):
    """Public keys that checkpoints are verified with, by version; raw Ed25519 in base64."""

    format: Literal["anamorph-checkpoint-keys/1"] = KEYS_FORMAT
    keys: dict[KeyVersion, Base64]


def read_public_keys(text: str) -> dict[int, bytes]:
    """The public keys of a file that ``CheckpointKeys`` describes.

    Raises:
        InvalidKey: not such a file, or not Ed25519 keys.
    """
    try:
        stored = CheckpointKeys.model_validate_json(text).keys
        keys = {version: b64decode(key, validate=True) for version, key in stored.items()}
    except ValueError:  # pydantic's ValidationError is one
        raise InvalidKey(f"this is no file of public keys of format {KEYS_FORMAT}") from None
    if not keys or any(len(key) != PUBLIC_KEY_BYTES for key in keys.values()):
        raise InvalidKey("a file of public keys holds at least one, each of 32 bytes in base64")
    return keys


@dataclass(frozen=True)
class Refused:
    """A checkpoint that proves nothing, and why; ``name`` says which."""

    name: str
    reason: str


@dataclass(frozen=True)
class Verdict:
    """What verification found.

    Args:
        head: the last row that holds; ``START`` if none does.
        broken: the first row that does not, ``None`` for a whole chain.
        refused: checkpoints that are forged, damaged or another tenant's.
        covered: the highest row that a checkpoint confirms, 0 if none does. Rows after it may
            have been rewritten, or others cut off behind them, without a trace.
    """

    head: Checkpoint
    broken: Break | None
    refused: tuple[Refused, ...]
    covered: int

    @property
    def intact(self) -> bool:
        """Whether rows and checkpoints agree and nothing was forged."""
        return self.broken is None and not self.refused

    @property
    def uncovered(self) -> int:
        """How many rows at the end no checkpoint confirms yet."""
        return self.head.sequence - self.covered


def verify_log(
    rows: Iterable[AuditRead],
    checkpoints: Iterable[SignedCheckpoint],
    public_keys: Mapping[int, bytes],
    tenant: str,
) -> Verdict:
    """Compare a whole log, from its first row on, with all checkpoints that were kept of it.

    Finds any edit, deletion, insertion or reordering of rows, and rows cut off the end or a
    chain computed anew as far as a checkpoint reaches. Rows are read once, one at a time.

    Args:
        rows: all rows in order, wherever they come from.
        checkpoints: in any order; those whose signature does not hold count for nothing.
        public_keys: raw Ed25519 keys by version.
        tenant: whose log this should be.
    """
    pinned, refused = _sorted_out(checkpoints, public_keys, tenant)
    head, covered = START, 0
    for step in heads(rows, tenant=tenant):
        if isinstance(step, Break):
            return Verdict(head, step, refused, covered)
        digests = pinned.get(step.sequence, set())
        if digests - {step.digest}:
            return Verdict(head, Break(step.sequence, OTHER_ROW), refused, covered)
        head, covered = step, step.sequence if digests else covered
    missing = cut_off(head, Checkpoint(max(pinned, default=0), ""))
    return Verdict(head, missing, refused, covered)


def _sorted_out(
    checkpoints: Iterable[SignedCheckpoint], public_keys: Mapping[int, bytes], tenant: str
) -> tuple[dict[int, set[str]], tuple[Refused, ...]]:
    """The digests that hold, by row, and the checkpoints that do not count."""
    pinned: dict[int, set[str]] = {}
    refused = []
    for checkpoint in checkpoints:
        try:
            if checkpoint.tenant != tenant:
                raise AuditRefused("the checkpoint belongs to another tenant's chain")
            checkpoint.verify_signature(public_keys)
        except AuditRefused as error:
            refused.append(Refused(object_name(checkpoint.tenant, checkpoint.sequence), str(error)))
        else:
            pinned.setdefault(checkpoint.sequence, set()).add(checkpoint.digest)
    return pinned, tuple(refused)
