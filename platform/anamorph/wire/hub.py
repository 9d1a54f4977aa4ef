"""References to model repositories of the Hugging Face hub: ``hf://org/name[@revision]``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

SCHEME = "hf://"

# As on the hub. A revision with a slash is refused: refs/pr/1 is what a stranger proposes to the repository.
_REFERENCE = re.compile(
    r"(?P<org>[A-Za-z0-9][A-Za-z0-9._-]{0,95})/(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,95})"
    r"(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._-]{0,127}))?"
)


@dataclass(frozen=True)
class HubReference:
    """A model repository, and the branch, tag or commit of it; ``None`` is its main branch."""

    repository: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubReference | None:
        """The reference in ``text``, with or without ``hf://``; ``None`` if it is none."""
        match = _REFERENCE.fullmatch(text.removeprefix(SCHEME))
        if match is None or ".." in text:
            return None
        return cls(f"{match['org']}/{match['name']}", match["revision"])

    def __str__(self) -> str:
        return f"{SCHEME}{self.repository}" + (f"@{self.revision}" if self.revision else "")

    def under(self, prefixes: Iterable[str]) -> bool:
        """Whether one of ``prefixes`` is this very reference, or ``hf://org/`` of its organisation."""
        organisation = f"{SCHEME}{self.repository.partition('/')[0]}"
        return any(prefix.rstrip("/") in {str(self), organisation} for prefix in prefixes)
