"""The key: a root per (tenant, model, version), its subkeys, and the numbers drawn from them."""

from __future__ import annotations

from anamorph.keys.derive import check_value, encode_context, subkey
from anamorph.keys.draw import Stream
from anamorph.keys.tenant import TenantKey, VocabKey

__all__ = ["Stream", "TenantKey", "VocabKey", "check_value", "encode_context", "subkey"]
