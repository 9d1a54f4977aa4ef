"""The HTTP routes, thin: they name the caller, call the service, and answer its message."""

from __future__ import annotations

from starlette.convertors import Convertor, register_url_convertor


class _Id(Convertor[str]):
    """An id in a path. Without a colon: else ``{id}`` would take what ``{id}:verb`` answers."""

    regex = "[a-z0-9_]{1,64}"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("id", _Id())
