"""The model that this machine's system serves, stored in the type that it is served in.

A replica keeps the stored type of its base. In bfloat16 a rotated weight is rounded
once more, which may turn a close decision between two tokens; folded from a float32
copy, the replica gives the very answers of the plaintext model.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from anamorph.cli.smollm2 import default_cache, fetch_smollm2
from anamorph.wire.admin import Dtype

_SAFETENSORS = "*.safetensors"


def default_model(dtype: Dtype, say: Callable[[str], None]) -> Path:
    """SmolLM2-135M-Instruct, fetched and converted once per cache; float32 if it is to be served so.

    Raises:
        SetupError: it cannot be downloaded.
    """
    folder = fetch_smollm2(progress=say)
    return in_float32(folder, default_cache(), say) if dtype == "float32" else folder


def in_float32(folder: Path, cache: Path, say: Callable[[str], None] = lambda _: None) -> Path:
    """A copy of a model folder with every weight stored as float32, made once per cache."""
    wanted = cache / f"{folder.name}-float32"
    if wanted.is_dir():
        return wanted
    say("storing the model as float32")
    with tempfile.TemporaryDirectory(dir=cache, prefix=".float32-") as scratch:
        staged = Path(scratch) / "model"
        shutil.copytree(folder, staged, ignore=shutil.ignore_patterns(_SAFETENSORS))
        for shard in folder.glob(_SAFETENSORS):
            _widen(shard, staged / shard.name)
        _restate_dtype(staged / "config.json")
        if not wanted.is_dir():  # another process may have been faster
            staged.rename(wanted)
    return wanted


def _widen(source: Path, target: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = {name: tensor.float() for name, tensor in load_file(source).items()}
    save_file(weights, target, metadata={"format": "pt"})


def _restate_dtype(config_file: Path) -> None:
    config = json.loads(config_file.read_text())
    config.pop("torch_dtype", None)
    config_file.write_text(json.dumps(config | {"dtype": "float32"}, indent=2))
