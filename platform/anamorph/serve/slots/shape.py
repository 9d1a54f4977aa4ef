"""What all members of a pool must have in common, read from a folder without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anamorph.errors import UnsupportedOption, WrongShape
from anamorph.serve.engines import folder as configuration
from anamorph.serve.slots.files import Files

# Settings that each key places elsewhere, and the version of the library that wrote the file.
_SPECIAL = ("bos", "eos", "pad", "unk", "sep", "cls", "mask", "decoder_start")
_ITS_OWN = {*(f"{name}_token_id" for name in _SPECIAL), "transformers_version", "_name_or_path"}


@dataclass(frozen=True)
class Shape:
    """A model's configuration, apart from ids that a key moves, and its tensors' names, types and shapes."""

    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[torch.dtype, torch.Size]]

    @classmethod
    def of(cls, folder: Path) -> Shape:
        """The shape of a folder.

        Raises:
            SetupError: files are missing or cannot be read.
        """
        config = configuration.read(folder, configuration.CONFIG)
        with Files(folder) as files:
            tensors = files.shapes
        return cls({name: value for name, value in config.items() if name not in _ITS_OWN}, tensors)

    def check(self, other: Shape) -> None:
        """Refuse a replica of another shape than this pool's.

        Raises:
            UnsupportedOption: another configuration; names the first option that differs.
            WrongShape: another set of tensors; names the first one that differs.
        """
        if name := _difference(self.config, other.config):
            raise UnsupportedOption(f"config.json differs from this pool's in '{name}': use another pool")
        if name := _difference(self.tensors, other.tensors):
            raise WrongShape(f"tensor '{name}' is not as in this pool's replicas: use another pool")


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    names = sorted(set(ours) | set(theirs))
    missing = object()
    return next((n for n in names if ours.get(n, missing) != theirs.get(n, missing)), None)
