"""A plaintext checkpoint → an object store, where materialisation jobs read it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from anamorph.errors import AnamorphError, BaseRefused, SetupError, StoreUnavailable
from anamorph.replica.files import ask
from anamorph.replica.location import OBJECT_STORES, remote_path
from anamorph.replica.stored import CONFIG
from anamorph.wire.objects import ObjectReference


def push_plain(folder: Path, names: Iterable[str], url: str) -> str:
    """Copy files of a checkpoint into a folder of a store; return that folder's URL.

    ``config.json`` comes last, so that a folder that has one is whole. One that was left by a push
    that was killed is filled anew; a whole one is never overwritten.

    Args:
        folder: of the checkpoint.
        names: of the files to copy, ``config.json`` among them.
        url: such as ``s3://bucket/path``.

    Raises:
        BaseRefused: there is a checkpoint already.
        StoreUnavailable: the store does not answer.
        SetupError: no URL of a store, or the store refuses these credentials.
    """
    reference = ObjectReference.parse(url)
    if reference is None or reference.scheme not in OBJECT_STORES or not reference.path:
        # Without the URL: what is refused may hold a password.
        raise SetupError(
            "where to push to reads s3://bucket/path or gs://bucket/path: "
            "names of letters, digits and ._=+@-, no credentials, no options"
        )
    filesystem, path = remote_path(str(reference))
    with _told(reference):
        filesystem.invalidate_cache()
        if ask(filesystem, "exists", f"{path}/{CONFIG}"):
            raise BaseRefused(
                f"{reference} holds a checkpoint already, which is never overwritten: name another folder"
            )
        for name in sorted(names, key=lambda name: (name == CONFIG, name)):
            filesystem.put_file(str(folder / name), f"{path}/{name}")
    return str(reference)


@contextlib.contextmanager
def _told(reference: ObjectReference) -> Iterator[None]:
    """A store's errors as ours."""
    try:
        yield
    except AnamorphError:
        raise
    except (PermissionError, FileNotFoundError):
        raise SetupError(
            f"the store refuses to write {reference}: check bucket, AWS_ACCESS_KEY_ID and what it may do"
        ) from None
    except Exception as error:  # noqa: BLE001 - file systems have errors of their own, few of them OSError
        # Without the cause: its text may quote a signed URL.
        raise StoreUnavailable(f"the store does not answer: {type(error).__name__}") from None
