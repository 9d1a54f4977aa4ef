"""Signed heads of audit chains, exported to where the database's owner cannot follow.

The format is ``anamorph.wire.checkpoints``; ``checkpoint_all`` is the background job.
"""

from anamorph_keysvc.checkpoints.export import export
from anamorph_keysvc.checkpoints.job import (
    Grown,
    Outcome,
    check,
    checkpoint_all,
    due,
    mark_exported,
    record,
    sign,
    unexported,
)
from anamorph_keysvc.checkpoints.signer import FILE_NAME, CheckpointSigner, LocalSigner

__all__ = [
    "FILE_NAME",
    "CheckpointSigner",
    "Grown",
    "LocalSigner",
    "Outcome",
    "check",
    "checkpoint_all",
    "due",
    "export",
    "mark_exported",
    "record",
    "sign",
    "unexported",
]
