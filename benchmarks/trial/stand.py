"""The whole system of one machine for a trial: key service, operator, Ray, and a fake or a real model."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.system.conftest import System
from tokenizers import Tokenizer as Backend
from tokenizers import models

from anamorph.cli.machine.home import TENANTS, Home
from anamorph.cli.machine.processes import marked
from anamorph.cli.machine.system import Plan, start, stop
from anamorph.cli.machine.tenants import ServedModel
from anamorph.wire.admin import RotationPolicy

__all__ = ["System", "fake_model", "left_over", "running", "write_tokenizer"]

ROOT = Path(__file__).parents[2]
QUICK_JOB = ROOT / "tests" / "system" / "quick_materializer.py"
VOCAB = 512
CONTEXT = 2048
# Short drains; the grace is the least that covers a client's cache, its longest request and propagation.
POLICY = RotationPolicy(
    client_cache_ttl_s=4,
    longest_request_s=20,
    clock_skew_s=0,
    propagation_s=1,
    grace_s=25,
    destroy_delay_s=60,
)


def fake_model(folder: Path, delay_ms: float, policy: RotationPolicy = POLICY) -> ServedModel:
    """A model without weights whose engine waits ``delay_ms`` before each token."""
    folder.mkdir()
    config = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
        "delay_ms": delay_ms,
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return ServedModel(folder, engine="fake", policy=policy)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of one word per id."""
    words = {f"w{number}": number for number in range(VOCAB)}
    vocabulary = models.WordLevel(words, unk_token="w0")  # noqa: S106 -- a word
    Backend(vocabulary).save(str(folder / "tokenizer.json"))
    kind: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))


@contextmanager
def running(
    model: ServedModel, *, tenants: tuple[str, ...] = TENANTS, interval_s: float = 0.5
) -> Iterator[System]:
    """The system with these tenants, each served; ended and removed at the end.

    Raises:
        SetupError: a component did not start, or a process survives the end.
    """
    home = Home(Path(tempfile.mkdtemp(prefix="anamorph-trial-")))
    home.create()
    job = f"{sys.executable} {QUICK_JOB}" if model.engine == "fake" else None
    plan = Plan(model, tenants=tenants, proxies=(), baseline=False, interval_s=interval_s, materializer=job)
    try:
        start(home, plan, lambda text: print(f"→ {text}", file=sys.stderr), lambda _: None)
        yield System(home)
    finally:
        stop(home)
        shutil.rmtree(home.root, ignore_errors=True)


def left_over(instance: str) -> list[str]:
    """Command lines of processes of a system that has ended."""
    return [" ".join(process.cmdline()) for process in marked(instance)]
