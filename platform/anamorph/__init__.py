"""Anamorph serves models whose weights and traffic are in a tenant's secret coordinates.

Each name below is imported when it is first used: a process of the compute zone
imports this package without ever loading the code that handles keys, and a client
without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version as _distribution_version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anamorph.client import AsyncClient, Client, TokenCodec
    from anamorph.errors import AnamorphError
    from anamorph.keys import TenantKey
    from anamorph.pipeline import fold, make_replica

__version__: str

__all__ = [
    "AnamorphError",
    "AsyncClient",
    "Client",
    "TenantKey",
    "TokenCodec",
    "__version__",
    "fold",
    "make_replica",
]

_HOME = {
    "AnamorphError": "anamorph.errors",
    "AsyncClient": "anamorph.client",
    "Client": "anamorph.client",
    "TenantKey": "anamorph.keys",
    "TokenCodec": "anamorph.client",
    "fold": "anamorph.pipeline",
    "make_replica": "anamorph.pipeline",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _distribution_version("anamorph")
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'anamorph' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
