"""Signatures are those of the specification: its reference library takes them, and nothing altered."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from anamorph_keysvc.webhooks import signature

SECRET = bytes(range(32))
BODY = '{"type":"key.retired","größe":1}'.encode()


def test_the_reference_library_verifies() -> None:
    """With the secret as its owner is shown it."""
    sent = signature.headers(SECRET, "evt_1", datetime.now(UTC), BODY)
    assert Webhook(signature.shown(SECRET)).verify(BODY, sent)["type"] == "key.retired"


def test_the_specification_s_example_has_its_signature() -> None:
    """A vector computed elsewhere: Svix's documented example."""
    secret = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    at = datetime.fromtimestamp(1614265330, UTC)
    sent = signature.headers(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", at, b'{"test": 2432232314}')
    assert sent["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize("altered", ["id", "timestamp", "body", "secret"])
def test_nothing_can_be_altered(altered: str) -> None:
    """Id, time, body and secret are all under the signature."""
    now = datetime.now(UTC)
    sent = signature.headers(SECRET, "evt_1", now, BODY)
    if altered == "id":
        sent["webhook-id"] = "evt_2"
    if altered == "timestamp":
        sent["webhook-timestamp"] = str(int(now.timestamp()) + 1)
    body = BODY + b" " if altered == "body" else BODY
    secret = bytes(32) if altered == "secret" else SECRET
    with pytest.raises(WebhookVerificationError):
        Webhook(signature.shown(secret)).verify(body, sent)


def test_an_old_message_is_refused_by_receivers() -> None:
    """The time of the attempt is signed, so a recorded message cannot be replayed later."""
    sent = signature.headers(SECRET, "evt_1", datetime.now(UTC) - timedelta(minutes=6), BODY)
    with pytest.raises(WebhookVerificationError, match="old"):
        Webhook(signature.shown(SECRET)).verify(BODY, sent)
