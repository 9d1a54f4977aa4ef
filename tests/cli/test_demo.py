from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from anamorph.cli.demo.questions import first_difference
from anamorph.client.tokenizer import Tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """Words as tokens."""
    words = {word: number for number, word in enumerate(["?", "the", "sky", "is", "blue", "grey"])}
    backend = Backend(models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(kind))
    return Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("answer", "expected", "said"),
    [
        (
            "the sky is blue",
            "the sky is grey",
            "token 4 is 'blue', in the plaintext model's greedy answer 'grey'",
        ),
        ("the sky", "the sky is", "token 3 is '', in the plaintext model's greedy answer 'is'"),
        ("the sky is", "the sky", "token 3 is 'is', in the plaintext model's greedy answer ''"),
        ("the  sky", "the sky", "token 3 is '', in the plaintext model's greedy answer ''"),
    ],
)
def test_the_first_differing_token_is_stated(
    tokenizer: Tokenizer, answer: str, expected: str, said: str
) -> None:
    """With a shorter type the demo says where and how the answer parts from the plaintext model's."""
    assert first_difference(tokenizer, answer, expected) == said
