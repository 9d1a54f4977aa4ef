"""Calls with the token of a person who sets Vault up or checks it; refusals quote Vault."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from anamorph.errors import SetupError
from anamorph_keysvc.vault.login import lookup
from anamorph_keysvc.vault.settings import VaultSettings
from anamorph_keysvc.vault.transport import Answer, Call, Transport

_NOWHERE = "anamorph-no-such-namespace"
Body = Mapping[str, Any]


@dataclass(frozen=True)
class Admin:
    """One person's token. Each method raises ``Unavailable`` as ``Transport.call`` does."""

    transport: Transport
    token: str = field(repr=False)

    def read(self, path: str, *, root: bool = False) -> Body | None:
        """What is there, None for nothing.

        Raises:
            SetupError: the token may not read it.
        """
        answer = self._call("read", "GET", path, None, root)
        # Vault says 400, not 404, of a mount that does not exist.
        if answer.status in (400, 404):
            return None
        return self._done(answer, path).data

    def write(self, path: str, body: Body, *, method: str = "POST", root: bool = False) -> None:
        """Set it.

        Raises:
            SetupError: Vault refuses, and why.
        """
        self._done(self._call("setup", method, path, body, root), path)

    def list(self, path: str) -> list[str]:
        """The names there. SetupError as ``read``."""
        answer = self._call("list", "LIST", path, None, root=False)
        return [] if answer.status == 404 else list(self._done(answer, path).data["keys"])

    def _call(self, operation: str, method: str, path: str, body: Body | None, root: bool) -> Answer:
        reading = method in ("GET", "LIST")
        call = Call(operation, method, tuple(path.split("/")), body, repeatable=reading, root=root)
        return self.transport.call(call, self.token)

    def _done(self, answer: Answer, path: str) -> Answer:
        if not answer.ok:
            raise SetupError(
                f"Vault refuses {path} with status {answer.status}: {answer.reasons or 'no reason'}"
            )
        return answer


def ignores_namespaces(settings: VaultSettings, token: str) -> bool:
    """Whether Vault takes a token for a namespace that does not exist, as its community edition does."""
    transport = Transport(settings.model_copy(update={"namespace": _NOWHERE}))
    try:
        return transport.call(lookup(), token).ok
    finally:
        transport.close()
