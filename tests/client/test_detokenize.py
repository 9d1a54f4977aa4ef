"""Incremental detokenisation."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from anamorph.client.detokenize import REPLACEMENT, Detokenizer
from anamorph.client.tokenizer import Tokenizer

relaxed = settings(deadline=None)
SCRIPTS = st.sampled_from(
    ["a", " ", "\n", "é", "ß", "é", "你", "好", "世", "한", "👋", "🌍", "👩‍👩‍👧", "ع", "नि", "\u200d"]
)
texts = st.one_of(st.text(), st.lists(SCRIPTS).map("".join))


def pieces(tokenizer: Tokenizer, ids: list[int], context: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(tokenizer.decode, context or [])
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@relaxed
@given(text=texts)
def test_the_pieces_make_the_text(tokenizer: Tokenizer, text: str) -> None:
    """Whatever the script, the pieces put together are the text."""
    assert "".join(pieces(tokenizer, tokenizer.encode(text))) == text


@relaxed
@given(text=texts)
def test_the_pieces_make_the_text_with_a_real_tokenizer(smollm2: Tokenizer, text: str) -> None:
    """The same with SmolLM2's vocabulary."""
    ids = smollm2.encode(text)
    assert "".join(pieces(smollm2, ids)) == smollm2.decode(ids)


@relaxed
@given(text=texts.filter(lambda text: REPLACEMENT not in text))
def test_no_half_character_is_given_out(tokenizer: Tokenizer, text: str) -> None:
    """U+FFFD never appears while a character may still be completed."""
    assert REPLACEMENT not in "".join(pieces(tokenizer, tokenizer.encode(text))[:-1])


@relaxed
@given(ids=st.lists(st.integers(0, 399)))
def test_any_ids_read_as_they_would_at_once(tokenizer: Tokenizer, ids: list[int]) -> None:
    """For ids that no text gives (broken bytes, special tokens) too, streaming changes nothing."""
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_an_unfinished_character_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    """An answer cut in the middle of a character ends in U+FFFD, as decoding it at once would."""
    ids = tokenizer.encode("𓀀")[:-1]
    given_out = pieces(tokenizer, ids)
    assert given_out[:-1] == [""] * len(ids)
    assert given_out[-1] == REPLACEMENT


def test_special_tokens_read_as_nothing(tokenizer: Tokenizer) -> None:
    """Control tokens do not appear in answers."""
    ids = [*tokenizer.encode("Hello"), 2, 0]
    assert "".join(pieces(tokenizer, ids)) == "Hello"


@cache
def sentence_piece() -> Backend:
    """A vocabulary as Llama's: leading-space pieces, bytes as <0xNN>, one leading space stripped."""
    words = ["▁", "▁Hello", "▁world", "!", "▁the", "a"]
    vocab = {word: i for i, word in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    backend = Backend(models.BPE(vocab, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["</s>"])
    return backend


def decode_sentence_piece(ids: list[int]) -> str:
    return str(sentence_piece().decode(ids, skip_special_tokens=True))


def ids_of(*names: str) -> list[int]:
    return [sentence_piece().get_vocab()[name] for name in names]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["▁Hello", "▁world", "!"], "Hello world!"),
        (["▁Hello", "</s>", "▁world"], "Hello world"),
        (["<0xE4>", "<0xBD>", "<0xA0>", "<0xE5>", "<0xA5>", "<0xBD>", "▁the"], "你好 the"),
        (["a", "<0xF0>", "<0x9F>", "<0x91>", "<0x8B>", "!"], "a👋!"),
    ],
)
def test_leading_spaces_and_byte_tokens(names: list[str], text: str) -> None:
    """Spaces between words survive, and bytes become characters, where pieces carry both."""
    detokenizer = Detokenizer(decode_sentence_piece)
    out = [detokenizer.push(token) for token in ids_of(*names)]
    assert REPLACEMENT not in "".join(out)
    assert "".join(out) + detokenizer.flush() == text


def test_an_answer_that_continues_a_text_keeps_its_leading_space() -> None:
    """After a prompt the first word keeps the space that a text of its own would lose."""
    detokenizer = Detokenizer(decode_sentence_piece, ids_of("▁Hello"))
    assert detokenizer.push(ids_of("▁world")[0]) == " world"
    assert Detokenizer(decode_sentence_piece).push(ids_of("▁world")[0]) == "world"
