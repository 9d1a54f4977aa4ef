"""References to folders of an object store: ``s3://bucket/path``, ``gs://bucket/path``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# Names that every store and client reads alike: no patterns, no options, no credentials.
_BUCKET = r"[A-Za-z0-9][A-Za-z0-9._-]{0,221}"
_NAME = r"[A-Za-z0-9_][A-Za-z0-9._=+@-]{0,254}"
_REFERENCE = re.compile(
    rf"(?P<scheme>[a-z][a-z0-9]{{0,15}})://(?P<bucket>{_BUCKET})(?P<path>(?:/{_NAME})*)/?"
)


@dataclass(frozen=True)
class ObjectReference:
    """A folder of an object store; an empty ``path`` is the whole bucket.

    Args:
        scheme: any; which ones are supported is decided where they are opened.
        path: names joined by ``/``, without one at either end.
    """

    scheme: str
    bucket: str
    path: str

    @classmethod
    def parse(cls, text: str) -> ObjectReference | None:
        """The reference in ``text``, with or without a ``/`` at its end; ``None`` if it is none."""
        match = _REFERENCE.fullmatch(text)
        if match is None or ".." in text:
            return None
        return cls(match["scheme"], match["bucket"], match["path"].removeprefix("/"))

    def __str__(self) -> str:
        return f"{self.scheme}://" + "/".join(self._components)

    def under(self, prefixes: Iterable[str]) -> bool:
        """Whether one of ``prefixes`` is this very folder, or one that it lies in."""
        return any(self._lies_in(ObjectReference.parse(prefix)) for prefix in prefixes)

    def _lies_in(self, other: ObjectReference | None) -> bool:
        if other is None or other.scheme != self.scheme:
            return False
        above = other._components
        return self._components[: len(above)] == above

    @property
    def _components(self) -> tuple[str, ...]:
        return (self.bucket, *(self.path.split("/") if self.path else ()))
