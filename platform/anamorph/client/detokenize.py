"""Token ids to text as they arrive: whole characters only, nothing said twice or taken back.

One token may hold half a character, and what a token reads as may depend on the one
before it (a leading space, bytes that only together are a character). So a short
window of ids is decoded again with each new one, and what is new at its end is
given out once it cannot change any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"


class Detokenizer:
    """Incremental decoding of one answer.

    Args:
        decode: text of a list of ids; special tokens read as nothing.
        context: ids that come right before the answer, where the answer continues
            their text; empty where it starts a text of its own.
    """

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(context)
        # Characters of the window's text that have been given out.
        self._given = len(decode(self._window).rstrip(REPLACEMENT)) if context else 0
        self._settled = len(self._window)  # ids of the window whose text has been given out whole

    def push(self, token_id: int) -> str:
        """Text that ``token_id`` makes certain; empty while a character is incomplete."""
        self._window.append(token_id)
        text = self._decode(self._window)
        # A trailing replacement character may be a character whose bytes are still coming.
        certain = text.rstrip(REPLACEMENT)
        new = certain[self._given :]
        self._given = max(self._given, len(certain))
        if new and certain == text:
            self._slide()
        return new

    def flush(self) -> str:
        """The rest, when no more ids come: an incomplete character reads as U+FFFD."""
        rest = self._decode(self._window)[self._given :]
        self._given += len(rest)
        return rest

    def _slide(self) -> None:
        """Drop ids before the last settled ones, which stay as context for the next."""
        self._window = self._window[self._settled :]
        self._settled = len(self._window)
        self._given = len(self._decode(self._window))
