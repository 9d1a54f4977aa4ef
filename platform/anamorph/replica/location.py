"""Where replicas and their bases may lie: folders and prefixes of object stores, by path or URL."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from anamorph.errors import BaseRefused, SetupError
from anamorph.wire import hub, objects

OBJECT_STORES = {"s3": "s3fs", "gs": "gcsfs", "memory": "fsspec"}
"""URL schemes beside ``file``, and the package behind each. fsspec's other schemes and chains are refused."""


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
        raise SetupError(f"{scheme}:// needs a package: pip install {OBJECT_STORES[scheme]}") from error
    return filesystem, str(path)


def allowed_base(base: str, prefixes: Iterable[str]) -> Path | hub.HubReference | objects.ObjectReference:
    """Where a base checkpoint is, if an allowed prefix covers it.

    That is a folder, with links of it and of the files in it followed first: a checkpoint cannot
    point out of what the operator allows; ``hf://…``, where a prefix is an organisation or one
    reference; or a folder of an object store, where a prefix covers what lies below it, name by
    name. Nothing is fetched here. No prefix at all allows nothing.

    Raises:
        BaseRefused: outside every prefix, or none of the three.
    """
    prefixes = list(prefixes)
    if base.startswith(hub.SCHEME):
        return _allowed_reference(base, prefixes)
    if _is_remote(base):
        return _allowed_objects(base, prefixes)
    return _allowed_folder(base, [Path(one).resolve() for one in prefixes if not _is_elsewhere(one)])


def _is_elsewhere(prefix: str) -> bool:
    return prefix.startswith(hub.SCHEME) or _is_remote(prefix)


def _is_remote(url: str) -> bool:
    scheme, separator, _ = url.partition("://")
    return bool(separator) and scheme in OBJECT_STORES


def _allowed_objects(base: str, prefixes: list[str]) -> objects.ObjectReference:
    reference = objects.ObjectReference.parse(base)
    if reference is None:
        # Without the URL: what is refused may hold a password.
        raise BaseRefused(
            "a base in an object store reads s3://bucket/path or gs://bucket/path: "
            "names of letters, digits and ._=+@-, no credentials, no options"
        )
    if not reference.under(prefixes):
        raise BaseRefused(f"{reference} is outside what --allow-base covers")
    return reference


def _allowed_reference(base: str, prefixes: list[str]) -> hub.HubReference:
    reference = hub.HubReference.parse(base)
    if reference is None:
        raise BaseRefused("a base on the hub reads hf://org/name or hf://org/name@revision")
    if not reference.under(prefixes):
        raise BaseRefused(f"{reference} is outside what --allow-base covers")
    return reference


def _allowed_folder(base: str, roots: list[Path]) -> Path:
    path = local_path(base)
    if path is None or not path.is_dir():
        raise BaseRefused(
            "the base is no folder on this machine: copy it to one that --allow-base covers, "
            "or name hf://org/name or s3://bucket/path"
        )
    if ".." in Path(base).parts:
        raise BaseRefused("the base's path must not hold '..': write it out")
    for place in (path, *path.iterdir()):
        if not any(place.resolve().is_relative_to(root) for root in roots):
            raise BaseRefused("the base, or a link in it, lies outside the folders that --allow-base covers")
    return path.resolve()
