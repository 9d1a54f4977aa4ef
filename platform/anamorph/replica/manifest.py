"""The identity of a replica: ``anamorph.json``, as docs/spec/replica.md defines it.

The file is canonical JSON and nothing else, so one manifest has one spelling and
its SHA-256 names it. It holds no secret and nothing that names the base.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError, model_validator

from anamorph.errors import InvalidId, ReplicaRefused
from anamorph.wire.admin import Message, Profile
from anamorph.wire.ids import KeyId

FORMAT: Final = "anamorph-replica/v1"
MANIFEST: Final = "anamorph.json"
CHUNK: Final = 4 * 2**20
MAX_MANIFEST: Final = 64 * 2**20
"""Bytes of the largest manifest that is read: enough for a replica of about 4 TB."""

_FIXED_NAMES = frozenset({"config.json", "generation_config.json", "model.safetensors.index.json"})
_TENSOR_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.safetensors")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
CheckValue = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
TensorName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]{1,300}$")]


def is_replica_file(name: str) -> bool:
    """Whether a file of this name may stand in a replica beside its manifest."""
    return name in _FIXED_NAMES or (_TENSOR_FILE.fullmatch(name) is not None and ".." not in name)


class FileEntry(Message):
    """One file: its length in bytes and the SHA-256 of each 4 MiB chunk, the last one shorter.

    A reader of a byte range checks just the chunks that the range touches.
    """

    size: int = Field(ge=0, strict=True)
    chunks: tuple[Sha256, ...]

    @model_validator(mode="after")
    def _one_digest_per_chunk(self) -> FileEntry:
        if len(self.chunks) != -(-self.size // CHUNK):
            raise ValueError("the number of chunk digests does not match the size")
        return self

    def matches(self, index: int, chunk: bytes) -> bool:
        """Whether ``chunk`` is the ``index``-th 4 MiB of this file."""
        length = min(CHUNK, self.size - index * CHUNK)
        return len(chunk) == length and hashlib.sha256(chunk).hexdigest() == self.chunks[index]


class Identity(Message):
    """Everything a manifest says apart from the files and the signature.

    Args:
        key_id: ``tenant.model.vN.kcv`` of the key that the replica was folded with.
        vocab_kcv: check value of the vocabulary subkey, which clients hold.
        table: id of the architecture table that the plan was built from.
        base_tag: keyed tag of the base's digest; tells bases apart only for the key's holder.
        plan_tag: keyed tag of the canonical plan.
        added: names of tensors that the base does not store, such as an untied head.
    """

    key_id: str
    kcv: CheckValue
    vocab_kcv: CheckValue
    profile: Profile
    table: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/@-]{0,99}$")
    base_tag: Sha256
    plan_tag: Sha256
    added: tuple[TensorName, ...] = ()

    @model_validator(mode="after")
    def _key_id_carries_kcv(self) -> Identity:
        try:
            parsed = KeyId.parse(self.key_id)
        except InvalidId as error:
            raise ValueError(str(error)) from error
        if parsed.kcv != self.kcv:
            raise ValueError("kcv is not the one in key_id")
        return self


class ReplicaManifest(Identity):
    """``anamorph.json``. ``signature`` is empty only between building and signing."""

    format: Literal["anamorph-replica/v1"] = FORMAT
    files: dict[str, FileEntry]
    signature: str = Field(default="", pattern=r"^(|[A-Za-z0-9+/]{85}[AQgw]==)$")

    @model_validator(mode="after")
    def _only_replica_files(self) -> ReplicaManifest:
        stray = sorted(name for name in self.files if not is_replica_file(name))
        if stray:
            raise ValueError(f"a replica holds no file called {stray[0]!r}")
        if "config.json" not in self.files:
            raise ValueError("config.json is missing")
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file but ``anamorph.json``."""
        return {name: file.size for name, file in self.files.items()}

    def signed_bytes(self) -> bytes:
        """What the Ed25519 signature covers: canonical JSON of every field but ``signature``."""
        return canonical_json(self.model_dump(mode="json", exclude={"signature"}))

    def to_bytes(self) -> bytes:
        """The exact content of ``anamorph.json``."""
        return canonical_json(self.model_dump(mode="json"))

    def sha256(self) -> str:
        """Hexadecimal SHA-256 of ``anamorph.json``, which pins the whole replica."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def from_bytes(cls, data: bytes) -> ReplicaManifest:
        """Parse ``anamorph.json``; the signature is not checked here.

        Raises:
            ReplicaRefused: another format version, malformed, or not canonical JSON.
        """
        fields = _object(data)
        if fields.get("format") != FORMAT:
            found = str(fields.get("format"))[:60]
            raise ReplicaRefused(f"manifest format {found!r} is not {FORMAT!r}: fold the replica again")
        try:
            manifest = cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ReplicaRefused(f"{MANIFEST}: {where}: {first['msg']}".replace(": : ", ": ")) from None
        # One spelling only: duplicate keys or other number forms could be read differently elsewhere.
        if manifest.to_bytes() != data:
            raise ReplicaRefused(f"{MANIFEST} is not canonical JSON")
        return manifest


def canonical_json(value: Any) -> bytes:
    """Canonical JSON: ASCII, keys sorted, no spaces. Values hold no floats, so this equals RFC 8785."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode("ascii")


def keyed_tag(subkey: bytes, message: bytes) -> str:
    """HMAC-SHA256 in hexadecimal: what tags of base and plan are, under ``subkey("plan")``."""
    return hmac.digest(subkey, message, "sha256").hex()


def _object(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        raise ReplicaRefused(f"{MANIFEST} is not JSON") from None
    if not isinstance(fields, dict):
        raise ReplicaRefused(f"{MANIFEST} is not a JSON object")
    return fields
