"""What the operator's options say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anamorph.errors import SetupError
from anamorph_operator.main import parse_baseline
from anamorph_operator.state import Baseline


def test_a_baseline_is_a_folder_or_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder says its context itself; a URL is handed on as it is, with the context that is named."""
    (tmp_path / "smol").mkdir()
    (tmp_path / "smol" / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    monkeypatch.chdir(tmp_path)
    assert parse_baseline("smol=smol,dtype=float32") == Baseline(
        "smol", str(tmp_path / "smol"), 512, dtype="float32"
    )
    url = "s3://models/plain/smol"
    assert parse_baseline(f"smol={url},context=64,engine=vllm") == Baseline("smol", url, 64, engine="vllm")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("smol=s3://models/smol", "context=2048"),
        ("smol=ftp://models/smol,context=9", "file, gs, memory, s3"),
        ("smol", "NAME=FOLDER"),
        ("smol=/x,colour=red", "NAME=FOLDER"),
    ],
)
def test_any_other_baseline_is_refused(text: str, reason: str) -> None:
    """The message says how one reads."""
    with pytest.raises(SetupError, match=reason):
        parse_baseline(text)
