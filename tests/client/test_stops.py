"""Stop strings."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from anamorph.client.stops import StopFinder

letters = st.text(alphabet="ab\n👋", max_size=40)
stops = st.lists(st.text(alphabet="ab\n👋", min_size=1, max_size=5), max_size=4)


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """What the rule says, read from its definition: look again after every character."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def streamed(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    finder = StopFinder(stops)
    out = "".join(finder.push(piece) for piece in pieces)
    return out + finder.flush(), finder.found


@given(st.lists(letters), stops)
def test_the_text_ends_before_the_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    """However the text is cut into pieces, what comes out is the text up to the first stop string."""
    assert streamed(pieces, stops) == cut("".join(pieces), stops)


@given(st.lists(letters), stops)
def test_nothing_of_a_stop_string_is_given_out(pieces: list[str], stops: list[str]) -> None:
    """No stop string, whole or begun and later completed, is ever in what was given out."""
    text, _ = streamed(pieces, stops)
    assert not any(stop in text for stop in stops)


@given(letters, stops)
def test_only_a_possible_beginning_is_held_back(text: str, stops: list[str]) -> None:
    """What is held back begins some stop string: a stream is not delayed for nothing."""
    finder = StopFinder(stops)
    held = text[len(finder.push(text)) :]
    assert finder.found or not held or any(stop.startswith(held) for stop in stops)


def test_nothing_comes_after_a_stop() -> None:
    """Once a stop string is found, later text is swallowed."""
    finder = StopFinder(["STOP"])
    assert finder.push("one ST") + finder.push("OP two") + finder.push(" three") + finder.flush() == "one "
    assert finder.found
