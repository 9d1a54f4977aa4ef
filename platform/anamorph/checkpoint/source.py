"""Where a base checkpoint comes from: a folder on this machine, or a repository of the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from anamorph.checkpoint.reader import CONFIG, GENERATION_CONFIG, INDEX, SINGLE, shard_names
from anamorph.errors import BaseRefused, CheckpointError
from anamorph.wire.hub import HubReference


def local_base(base: str | os.PathLike[str], cache: Path | None = None) -> Path:
    """The folder of a base checkpoint, fetched from the hub first where ``base`` says so.

    Args:
        base: a folder, ``hf://org/name[@revision]``, or ``org/name`` where no such folder exists.
        cache: the hub's cache folder; by default the one that ``HF_HOME`` names.

    Raises:
        CheckpointError: the hub cannot be reached, or a download broke off.
        BaseRefused: neither a folder nor a repository that holds safetensors.
    """
    if Path(base).is_dir():
        return Path(base)
    reference = HubReference.parse(os.fspath(base))
    if reference is None:
        raise BaseRefused(
            f"there is no folder {base}, and a hub id reads hf://org/name or hf://org/name@revision"
        )
    return fetch_base(reference, cache)


def fetch_base(reference: HubReference, cache: Path | None = None) -> Path:
    """Download what a fold reads of a repository, and nothing else; return its folder in the hub's cache.

    Tokenizers, pickles and code stay where they are. With ``HF_HUB_OFFLINE=1``, or
    without a network, the cache must hold the files already.

    Raises:
        CheckpointError: the hub cannot be reached, or a download broke off.
        BaseRefused: no such repository or revision for this user, or one without safetensors.
    """
    folder = _download(reference, [CONFIG, GENERATION_CONFIG, SINGLE, INDEX], cache)
    if not any((folder / name).exists() for name in (SINGLE, INDEX)):
        raise BaseRefused(
            f"{reference} holds no {SINGLE} and no {INDEX}; only safetensors are ever read: "
            "convert it, and name the folder"
        )
    # The commit, so that both downloads are of one state of the repository.
    names = shard_names(folder)
    _download(HubReference(reference.repository, folder.name), names, cache)
    missing = [name for name in (CONFIG, *names) if not (folder / name).exists()]
    if missing:
        raise CheckpointError(f"{missing[0]} of {reference} is not in the hub's cache; {_REMEDY}")
    return folder


_REMEDY = "connect to the hub (HF_ENDPOINT, HF_HUB_OFFLINE), or copy the model to a folder and name that"


def _download(reference: HubReference, names: list[str], cache: Path | None) -> Path:
    with _told(reference):
        return Path(
            snapshot_download(
                reference.repository, revision=reference.revision, cache_dir=cache, allow_patterns=names
            )
        )


@contextmanager
def _told(reference: HubReference) -> Iterator[None]:
    """The hub's errors as ours: what asking again cannot change is a refusal."""
    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise BaseRefused(
            f"the hub has no {reference} for this user: check the name, and HF_TOKEN if it is not public"
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{reference} is not in the hub's cache, and no hub answers; {_REMEDY}"
        ) from error
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise CheckpointError(f"cannot fetch {reference} ({type(error).__name__}); {_REMEDY}") from error
