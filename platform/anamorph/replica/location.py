"""Where replicas may lie: a folder, or a prefix of an object store, named by path or URL."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from anamorph.errors import SetupError

OBJECT_STORES = frozenset({"s3", "gs", "memory"})
"""URL schemes beside ``file``. Others, and fsspec's chains such as ``zip::``, are refused."""


def local_path(location: str | os.PathLike[str]) -> Path | None:
    """Absolute path of a folder given as path or ``file://`` URL; ``None`` for an object store's URL.

    Raises:
        SetupError: a scheme that is not supported, or a URL that carries credentials or options.
    """
    text = os.fspath(location)
    if not isinstance(location, str) or "://" not in text:
        return Path(text).absolute()
    parts = urlsplit(text)
    if parts.scheme == "file" and not parts.netloc:
        return Path(text.removeprefix("file://")).absolute()
    if parts.scheme not in OBJECT_STORES:
        known = ", ".join(sorted(OBJECT_STORES))
        raise SetupError(f"a store is a folder or a URL of file, {known}; not {parts.scheme[:20]!r}")
    # The message must not repeat the URL: what it refuses may be a password.
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise SetupError("a store's URL carries no credentials or options: configure them outside the URL")
    return None


def remote_path(url: str) -> tuple[Any, str]:
    """The fsspec file system and path of an object store's URL.

    Raises:
        SetupError: the file system's package is not installed.
    """
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        scheme = urlsplit(url).scheme
        raise SetupError(f"{scheme}:// needs an extra package: pip install 'anamorph[{scheme}]'") from error
    return filesystem, str(path)
