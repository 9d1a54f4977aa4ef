"""Checkpoints in a real object store: written once, whoever tries again."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
import s3fs

from anamorph import errors
from anamorph.wire.audit import Checkpoint
from anamorph.wire.checkpoints import decode
from anamorph_keysvc.checkpoints import LocalSigner, export, sign

if TYPE_CHECKING:
    from tests.servers.s3 import Server

pytestmark = [pytest.mark.real, pytest.mark.slow]

AT = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def destination(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place in the store; its credentials are in the environment only."""
    from tests.servers.s3 import BUCKET

    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    return f"s3://{BUCKET}/{secrets.token_hex(6)}"


def test_a_checkpoint_is_written_once_and_never_over(s3_server: Server, destination: str) -> None:
    """The same again changes nothing; another chain under the same number is an alarm."""
    signer = LocalSigner(bytes(32))
    checkpoint = sign(signer, "acme", Checkpoint(7, "a" * 64), AT)
    export(destination, checkpoint)
    export(destination, checkpoint)
    [stored] = s3_server.client().find(destination)
    text = s3_server.client().cat_file(stored).decode()
    assert decode(text) == checkpoint
    decode(text).verify_signature(signer.public_keys())
    forged = sign(signer, "acme", Checkpoint(7, "b" * 64), AT)
    with pytest.raises(errors.AuditRefused):
        export(destination, forged)
    assert s3_server.client().cat_file(stored).decode() == text


def test_a_store_that_refuses_is_said_to_be_away(destination: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong credentials: the checkpoint stays with us and is tried again; no secret is repeated."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(errors.Unavailable) as refused:
        export(destination, sign(LocalSigner(bytes(32)), "acme", Checkpoint(8, "a" * 64), AT))
    assert "wrong-secret" not in str(refused.value)
