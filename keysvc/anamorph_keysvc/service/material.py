"""From an opened root to the key of a version."""

from __future__ import annotations

import hmac

from anamorph import errors
from anamorph.keys import TenantKey
from anamorph_keysvc.service.lookup import Releasable
from anamorph_keysvc.tables import KeyVersion


def key_of(root: bytes, row: KeyVersion | Releasable) -> TenantKey:
    """The key of ``row``, whose root is ``root`` (32 bytes).

    Raises:
        KeyMismatch: the root does not give the row's check value: it is another's.
    """
    key = TenantKey.from_root(root, row.tenant, row.model, row.version)
    if not hmac.compare_digest(key.id, row.key_id or ""):
        raise errors.KeyMismatch(f"the stored root is not the one of {row.key_id}")
    return key
