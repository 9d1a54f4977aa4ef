"""The base of `make test-cluster-faults`: it can be registered, and its answer can be compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from tests.cluster import tiny
from tests.cluster.conversation import MOST_TOKENS, QUESTION
from tests.cluster.stand import model

from anamorph.cli.smollm2 import fetch_smollm2
from anamorph.client.tokenizer import Tokenizer
from anamorph_operator.kubernetes.resources.encrypted_model import EncryptedModelSpec

Run = Callable[..., CompletedProcess[str]]
pytestmark = pytest.mark.slow


def test_a_tiny_base(anamorph: Run, tmp_path: Path) -> None:
    """What `base push` says of it makes an object; its answer is plain text, always the same."""
    folder = tmp_path / "tiny"
    tiny.make(folder, fetch_smollm2(), QUESTION, MOST_TOKENS)
    done = anamorph("base", "show", folder, "--json")
    assert done.returncode == 0, done.stderr
    spec = model({"uri": "s3://bases/tiny", **json.loads(done.stdout)})["spec"]
    assert EncryptedModelSpec.model_validate(spec).context_length == tiny.CONTEXT
    said = tiny.answer(folder, QUESTION, MOST_TOKENS)
    assert said.isascii()
    assert said.strip()
    assert said == tiny.answer(folder, QUESTION, MOST_TOKENS)


def test_the_question_is_the_proxys() -> None:
    """The ids that are computed in clear are those that the proxy encrypts."""
    from transformers import AutoTokenizer

    folder = fetch_smollm2()
    ids = tiny.asked(AutoTokenizer.from_pretrained(folder), QUESTION)
    assert ids == Tokenizer(folder).encode_chat([{"role": "user", "content": QUESTION}])
