"""A plaintext checkpoint as an object store lists it, and which of its files are ever read."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from anamorph.errors import AnamorphError, BaseRefused, CheckpointError, StoreUnavailable
from anamorph.replica.contents import INDEX, MAX_JSON
from anamorph.replica.files import ask
from anamorph.replica.location import remote_path
from anamorph.replica.manifest import is_replica_file
from anamorph.replica.ranged import patiently

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
SINGLE = "model.safetensors"
# Where file systems say that an object is another one than before, the surest first.
_MARKS = ("ETag", "etag", "md5Hash", "generation", "LastModified", "created")


@dataclass(frozen=True)
class Stored:
    """One object: its bytes, and a mark that is another one once it has been replaced."""

    size: int
    mark: str


Listing = Mapping[str, Stored]


class StoredCheckpoint:
    """A checkpoint's folder in an object store.

    Args:
        url: such as ``s3://bucket/path``.

    Raises:
        SetupError: the package for this kind of store is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs, path = remote_path(self.url)
        self._path = path.rstrip("/")

    def wanted(self) -> Listing:
        """The files that are read of it, and nothing else.

        Raises:
            BaseRefused: what must be there is not.
            StoreUnavailable: the store does not answer.
        """
        found = patiently(self._listed)
        names = [CONFIG, *self._weights(found)]
        missing = [name for name in names if name not in found]
        if missing:
            raise BaseRefused(f"{self.url} holds no {missing[0]}: upload the whole checkpoint")
        names += [GENERATION_CONFIG] if GENERATION_CONFIG in found else []
        for name in names:
            self._check_size(name, found[name].size)
        return {name: found[name] for name in sorted(names)}

    def state(self, wanted: Listing) -> str:
        """A name for this state of the checkpoint: 64 hexadecimal digits, as long as a manifest's digest."""
        lines = [self.url, *(f"{name} {one.size} {one.mark}" for name, one in wanted.items())]
        return hashlib.sha256("\n".join(lines).encode("utf-8")).hexdigest()

    def _weights(self, found: Listing) -> list[str]:
        if SINGLE in found:
            return [SINGLE]
        if INDEX not in found:
            raise BaseRefused(
                f"{self.url} holds no {SINGLE} and no {INDEX}; only safetensors are ever read: "
                "convert it, and upload that"
            )
        self._check_size(INDEX, found[INDEX].size)
        return [INDEX, *_shards(self.url, patiently(lambda: self.read(INDEX, 0, found[INDEX].size)))]

    def _check_size(self, name: str, size: int) -> None:
        if name.endswith(".json") and not 0 < size <= MAX_JSON:
            raise BaseRefused(f"{name} of {self.url} has {size} bytes: a configuration has 1 to {MAX_JSON}")

    def _listed(self) -> Listing:
        # The listing must not come from fsspec's cache: the checkpoint may have been replaced since.
        self._fs.invalidate_cache()
        with self._told():
            entries = ask(self._fs, "ls", self._path, detail=True)
        files = [entry for entry in entries if entry["type"] == "file"]
        found = {str(entry["name"]).removeprefix(f"{self._path}/"): _stored(entry) for entry in files}
        return {name: stored for name, stored in found.items() if is_replica_file(name)}

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` of one file.

        Raises:
            BaseRefused: it is not there, or may not be read.
            CheckpointError: it is shorter than it was listed.
            StoreUnavailable: the store does not answer.
        """
        with self._told():
            data = bytes(ask(self._fs, "cat_file", f"{self._path}/{name}", start=start, end=stop))
        if len(data) != stop - start:
            raise CheckpointError(f"{name} of {self.url} changed while it was fetched")
        return data

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """A store's errors as ours: what asking again cannot change is a refusal."""
        try:
            yield
        except AnamorphError:
            raise
        except FileNotFoundError:
            raise BaseRefused(f"there is no {self.url}, or something of it is gone: check the name") from None
        except PermissionError:
            raise BaseRefused(
                f"{self.url} may not be listed and read with the credentials of this process"
            ) from None
        except Exception as error:  # noqa: BLE001 - file systems have errors of their own, few of them OSError
            # Without the cause: its text may quote a signed URL.
            raise StoreUnavailable(
                f"the store of {self.url} does not answer: {type(error).__name__}"
            ) from None


def _stored(entry: Mapping[str, Any]) -> Stored:
    mark = next((str(entry[name]) for name in _MARKS if entry.get(name)), "")
    return Stored(int(entry["size"] or 0), mark)


def _shards(url: str, index: bytes) -> list[str]:
    """Names of the files with weights, as the index says."""
    try:
        weight_map = json.loads(index)["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        names = []
    if not names:
        raise BaseRefused(f"{INDEX} of {url} has no weight_map")
    for name in names:
        if not (name.endswith(".safetensors") and is_replica_file(name)):
            raise BaseRefused(
                f"{INDEX} of {url} names {name[:200]!r}, which is not the plain name of a safetensors file"
            )
    return names
