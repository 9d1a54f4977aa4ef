"""Every exception of the product, under one base.

    AnamorphError
    ├── InvalidId              an identifier outside the grammar of ``wire.ids``
    ├── InvalidKey             a key file, root or subkey that is malformed
    ├── KeyMismatch            well formed, but not the key that was asked for
    ├── UnsupportedModel
    │   ├── UnknownArchitecture
    │   ├── UnsupportedOption
    │   ├── UnknownTensor
    │   ├── MissingTensor
    │   └── WrongShape
    ├── CheckpointError        a checkpoint that cannot be read or written
    │   ├── BaseRefused        a base that is not allowed, or none at all
    │   └── FoldInterrupted    a worker died; the same call goes on from what is finished
    ├── ReplicaError
    │   ├── ReplicaRefused     unsigned, altered, foreign or incomplete: one error for all
    │   └── ReplicaExists
    ├── StoreUnavailable       a replica store that does not answer now
    ├── MaterializationError   the replica does not compute what the base computes
    ├── AuditRefused           an audit log or checkpoint that is forged, damaged or unreadable
    ├── MixedKeys              a step that would have computed with another key's weights
    ├── StreamInterrupted      a stream that ended without its finish reason
    ├── SetupError             a missing component or setting on this machine
    └── ServiceError           an answer of the key service or an inference endpoint
        ├── BadRequest 400     ├── Unauthenticated 401   ├── Forbidden 403
        ├── NotFound 404       ├── Conflict 409          ├── Gone 410
        ├── PreconditionFailed 412  ├── TooLarge 413     ├── Unprocessable 422
        ├── TooManyRequests 429     └── Unavailable 503

Which HTTP status belongs to which class is decided once, in ``wire.problems``.
"""

from __future__ import annotations


class AnamorphError(Exception):
    """Base of every error that Anamorph raises on purpose.

    The message says what was wrong and what to do; it never contains key
    bytes, prompt text or token ids.
    """


class InvalidId(AnamorphError):
    """An identifier does not match the grammar of ``anamorph.wire.ids``."""


class InvalidKey(AnamorphError):
    """Key material is malformed: wrong length, wrong file format, wrong check value."""


class KeyMismatch(AnamorphError):
    """Key material is well formed but belongs to another key id."""


class UnsupportedModel(AnamorphError):
    """No table covers this checkpoint; it is refused rather than guessed."""


class UnknownArchitecture(UnsupportedModel):
    """No table exists for the architecture named in ``config.json``."""


class UnsupportedOption(UnsupportedModel):
    """A configuration option or value is outside what the table covers."""


class UnknownTensor(UnsupportedModel):
    """The checkpoint holds a tensor that the table does not name."""


class MissingTensor(UnsupportedModel):
    """The table names a tensor that the checkpoint does not hold."""


class WrongShape(UnsupportedModel):
    """A tensor's shape or dtype is not the one the configuration implies."""


class CheckpointError(AnamorphError):
    """A checkpoint folder cannot be read or written."""


class BaseRefused(CheckpointError):
    """A base checkpoint is outside what the operator allows, or is nothing that can be read."""


class FoldInterrupted(CheckpointError):
    """A process that folds has died; what it finished stays, and the same call goes on from there."""


class ReplicaError(AnamorphError):
    """Base of errors about encrypted replicas."""


class ReplicaRefused(ReplicaError):
    """A replica fails verification; deliberately one error for every forgery."""


class ReplicaExists(ReplicaError):
    """A replica is already published at this place; it is never overwritten."""


class StoreUnavailable(AnamorphError):
    """A replica store does not answer; it may later, so this says nothing about the replica."""


class MaterializationError(AnamorphError):
    """The folded replica does not compute what its base computes."""


class AuditRefused(AnamorphError):
    """An audit log or one of its checkpoints is forged, damaged or unreadable."""


class MixedKeys(AnamorphError):
    """A step would have computed with another key's weights; the engine stops rather than answer."""


class StreamInterrupted(AnamorphError):
    """A streamed answer ended without a finish reason: it is incomplete."""


class SetupError(AnamorphError):
    """A component or setting is missing on this machine; the message names the remedy."""


class ServiceError(AnamorphError):
    """An error answer of the key service or of an inference endpoint.

    Args:
        message: what was wrong and what to do.
        code: stable machine-readable word, for example ``wrong_key``.
        param: the request field at fault, where there is one.
        retry_after: seconds after which a retry makes sense, or ``None``.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.param = param
        self.retry_after = retry_after


class BadRequest(ServiceError):
    """400: malformed or unsupported request."""


class Unauthenticated(ServiceError):
    """401: no credential, or one that is not accepted here."""


class Forbidden(ServiceError):
    """403: authenticated, but not allowed; or the key is suspended."""


class NotFound(ServiceError):
    """404: no such object for this caller."""


class Conflict(ServiceError):
    """409: the object's state, or the key in use, does not admit this request."""


class Gone(ServiceError):
    """410: this key version is retired, revoked or destroyed."""


class PreconditionFailed(ServiceError):
    """412: the row changed since the caller read it."""


class TooLarge(ServiceError):
    """413: the request body is larger than the limit."""


class Unprocessable(ServiceError):
    """422: well-formed but refused, for example plaintext where ids are required."""


class TooManyRequests(ServiceError):
    """429: over a limit; ``retry_after`` says when to come back."""


class Unavailable(ServiceError):
    """503: not able to answer now; ``retry_after`` says when to come back."""
