"""Signatures by the Standard Webhooks specification (symmetric, ``v1``)."""

from __future__ import annotations

import base64
import hashlib
import hmac
from datetime import datetime

SECRET_BYTES = 32
_PREFIX = "whsec_"


def shown(secret: bytes) -> str:
    """A secret as its owner is shown it, once, and as receivers' libraries take it."""
    return _PREFIX + base64.b64encode(secret).decode()


def headers(secret: bytes, message: str, at: datetime, body: bytes) -> dict[str, str]:
    """What a receiver verifies a message by.

    Args:
        secret: the webhook's, 32 bytes.
        message: id of the message: the same at each attempt, so that receivers drop repetitions.
        at: time of this attempt; receivers refuse old ones, so that a message cannot be replayed.
        body: exactly the bytes that are sent.
    """
    timestamp = str(int(at.timestamp()))
    signed = b".".join((message.encode(), timestamp.encode(), body))
    signature = base64.b64encode(hmac.digest(secret, signed, hashlib.sha256)).decode()
    return {
        "webhook-id": message,
        "webhook-timestamp": timestamp,
        "webhook-signature": f"v1,{signature}",
    }
